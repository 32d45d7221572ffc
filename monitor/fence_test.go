package monitor

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"redoubt.dev/redoubt/isolate"
	"redoubt.dev/redoubt/isolate/attack"
	"redoubt.dev/redoubt/isolate/policy"
	"redoubt.dev/redoubt/lab"
	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/lab/workload"
	"redoubt.dev/redoubt/pci"
	"redoubt.dev/redoubt/pci/topology"
	"redoubt.dev/redoubt/virtio"
)

// fenced boots a guest that loads modules, uses them and takes them away again, and returns what it found (its lines RESULT).
func fenced(t *testing.T, vcpus int, kernel string, m *isolate.Modules, files map[string]string, modules ...string) (results []string, r isolate.Report) {
	t.Helper()
	tpm := startTPM(t)
	g := boot{
		kernel: kernel, vcpus: vcpus, what: "modules", modules: modules, files: files,
		extra: "cryptomgr.notests=0", // what tests ciphers runs in their modules
		change: func(cfg *Config) {
			cfg.TPM, cfg.Modules = tpm, m
			cfg.Devices = []pci.Placed{rng(t)}
		},
	}.build(t)
	if o := g.run(t); o.Kind != PowerOff {
		t.Errorf("outcome %v", o)
	}
	for line := range strings.Lines(g.console.String()) {
		if r, ok := strings.CutPrefix(strings.TrimRight(line, "\r\n"), "RESULT "); ok {
			results = append(results, r)
		}
	}
	r, _ = g.Fenced()
	if t.Failed() || testing.Verbose() {
		t.Logf("%s", g.console)
	}
	return results, r
}

func rng(t testing.TB) pci.Placed {
	t.Helper()
	_, f, err := virtio.New(virtio.NewRNG())
	if err != nil {
		t.Fatal(err)
	}
	return pci.Placed{Function: f, Place: topology.Place{Kind: topology.RNG, Slot: 1, BAR: barBase, Size: 0x8000, Route: topology.FirstRoute, Vectors: 2}}
}

// Debian's own modules work in views of their own as they do without.
func TestFence(t *testing.T) {
	lab.NeedsKVM(t)
	worksFenced(t, 1, debian.Usual, []policy.Mode{policy.Learn, policy.Enforce}, []string{"virtio", "virtio_ring", "virtio_pci", "virtio_pci_modern_dev", "virtio_pci_legacy_dev"}, nil,
		"dummy", "null_blk", "xor", "crc32c_generic", "xxhash_generic", "virtio_pci", "virtio_rng")
}

// A file system works isolated: three modules, which read and write the kernel's caches of files. Everything is allowed: which
// fields of which objects a file system writes depends on what else happens, and is not learnt in one run.
func TestFenceFileSystem(t *testing.T) {
	lab.NeedsKVM(t)
	image := filepath.Join(t.TempDir(), "fs.img")
	for _, c := range [][]string{
		{"mformat", "-C", "-i", image, "-T", "8192", "-h", "16", "-s", "32", "::"},
		{"mcopy", "-i", image, "-", "::greeting.txt"},
	} {
		cmd := cache(t).Command(t.Context(), c[0], c[1:]...)
		cmd.Env = append(cmd.Env, "MTOOLS_SKIP_CHECK=1")
		cmd.Stdin = strings.NewReader("hello\n")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", c, err, out)
		}
	}
	worksFenced(t, 2, "6.12", []policy.Mode{policy.Learn}, []string{"loop"}, map[string]string{"fs.img": image}, "loop", "nls_cp437", "nls_ascii", "vfat")
}

// worksFenced has a guest use modules without isolation, then in each mode, with what the one before has learnt.
func worksFenced(t *testing.T, vcpus int, kernel string, modes []policy.Mode, trusted []string, files map[string]string, modules ...string) {
	want, _ := fenced(t, vcpus, kernel, nil, files, modules...)
	if len(want) < 8 {
		t.Fatalf("without isolation: %q", want)
	}
	policies := isolate.Modules{Default: isolate.Isolate, Trusted: trusted, Mode: policy.Learn}
	for _, mode := range modes {
		policies.Mode = mode
		got, r := fenced(t, vcpus, kernel, &policies, files, modules...)
		if !slices.Equal(got, want) {
			t.Errorf("%s: the guest found\n%s\nand without isolation\n%s", mode, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		for name, a := range r.Modules {
			t.Logf("%s: %s: %s", mode, name, summary(a))
			verdict, idle := isolate.Isolate, len(a.Entries) == 0
			if slices.Contains(trusted, name) {
				verdict, idle = isolate.Trust, false
			}
			if a.Verdict != verdict || a.Refused > 0 || !a.Unloaded || idle {
				t.Errorf("%s: %s: %+v", mode, name, a)
			}
		}
		for _, e := range r.Events {
			if !e.Allowed {
				t.Errorf("%s: %v", mode, e)
			}
		}
		policies.Profiles = r.Profiles
	}
}

// Debian's crc32c hashes isolated what it has to, by each digest in a block of zeros that the next is made of.
func TestFenceChecksum(t *testing.T) {
	lab.NeedsKVM(t)
	const times = 20
	block := make([]byte, 4096)
	for range times {
		binary.LittleEndian.PutUint32(block, crc32.Checksum(block, crc32.MakeTable(crc32.Castagnoli)))
	}
	want := fmt.Sprintf("value %d %d ", times, binary.LittleEndian.Uint32(block))
	program, err := workload.Build(t.Context(), cache(t))
	if err != nil {
		t.Fatal(err)
	}
	inBothModes(t, "crc32c_generic", scripts{
		kernel: "6.1", extra: "cryptomgr.notests=0", debian: []string{"crc32c_generic", "af_alg", "algif_hash"}, files: map[string]string{"workload": program},
		script: fmt.Sprintf("for m in $(cat /mod/order); do insmod /mod/$m; done; echo CHECK digest $(/workload digest %d); echo LIVES\n", times),
	}, "digest", want, "af_alg", "algif_hash")
}

// The kernel patches an isolated module's code for the module's static key, while the module is called, and back.
func TestFenceStaticKey(t *testing.T) {
	lab.NeedsKVM(t)
	built, err := attack.Build(t.Context(), cache(t), debian.Usual)
	if err != nil {
		t.Fatal(err)
	}
	inBothModes(t, "keyed", scripts{
		files: map[string]string{"mod/keyed.ko": built["keyed"]},
		script: `insmod /mod/keyed.ko; k=/proc/keyed
for n in 1 2 3; do way="$way $(cat $k)"; echo 1 >$k; way="$way $(cat $k)"; echo 0 >$k; done
rmmod keyed; echo CHECK way $way; echo LIVES
`,
	}, "way", strings.TrimSpace(strings.Repeat("straight taken ", 3)))
}

// inBothModes has a module isolated that learns, then may do what it has learnt; each time what it says begins with what is wanted, and
// nothing is refused.
func inBothModes(t *testing.T, module string, s scripts, key, want string, trusted ...string) {
	t.Helper()
	m := isolate.Modules{Default: isolate.Isolate, Trusted: trusted, Mode: policy.Learn}
	for _, mode := range []policy.Mode{policy.Learn, policy.Enforce} {
		m.Mode = mode
		s.modules = &m
		said, r := s.run(t)
		a := r.Modules[module]
		if !strings.HasPrefix(said[key]+" ", strings.TrimSpace(want)+" ") || a == nil || a.Verdict != isolate.Isolate || a.Refused > 0 || len(a.Entries) < 2 {
			t.Fatalf("%s: %q, want %q; %+v", mode, said[key], want, a)
		}
		t.Logf("%s: %s", mode, summary(a))
		m.Profiles = r.Profiles
	}
}

// What the policy does not trust does not run, and what has a valid signature and is trusted is left alone.
func TestFenceRefuses(t *testing.T) {
	lab.NeedsKVM(t)
	m := isolate.Modules{Default: isolate.Refuse, Trusted: []string{"xxhash_generic"}}
	got, r := fenced(t, 1, debian.Usual, &m, nil, "dummy", "xxhash_generic")
	want := []string{"loaded xxhash_generic.ko", "rng none 0", "crc32c 1", "xxhash64 1", "module xxhash_generic", "gone xxhash_generic"}
	if !slices.Equal(got, want) {
		t.Errorf("the guest found %q, want %q", got, want)
	}
	for name, verdict := range map[string]isolate.Verdict{"dummy": isolate.Refuse, "xxhash_generic": isolate.Trust} {
		if a := r.Modules[name]; a == nil || a.Verdict != verdict {
			t.Errorf("%s: %+v", name, a)
		}
	}
}

func summary(a *isolate.Account) string {
	sum := func(m map[string]uint64) (n uint64) {
		for _, c := range m {
			n += c
		}
		return n
	}
	return fmt.Sprintf("%d pages of code; %d functions entered %d times; %d functions called %d times; resumed %d times; %d pages read; %d writes to %d objects",
		a.Pages, len(a.Entries), sum(a.Entries), len(a.Calls), sum(a.Calls), a.Resumed, a.Reads, sum(a.Writes), len(a.Writes))
}
