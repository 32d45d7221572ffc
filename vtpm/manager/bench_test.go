package manager

import (
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/vtpm/engine"
	"redoubt.dev/redoubt/vtpm/keys"
)

// BenchmarkVTPMCreateToReady measures a new guest's vTPM from the call to ready: saved
// record, engine, platform authorisation and measurements in all banks. ms is the median;
// x-faster is how much longer swtpm_setup with its usual provisioning and the start of an swtpm on
// its result take, median too, in the same run.
func BenchmarkVTPMCreateToReady(b *testing.B) {
	root := tools(b)
	m := newManager(b, stateDir(b))
	events := Fixed(boot(b, "console=ttyS0"))
	var ours []time.Duration
	for n := 0; b.Loop(); n++ {
		id := fmt.Sprintf("0b5ff3a6-0d8e-4a1c-9c41-%012d", n)
		begin := time.Now()
		d, err := m.Start(b.Context(), id, events)
		if err != nil {
			b.Fatal(err)
		}
		ours = append(ours, time.Since(begin))
		b.StopTimer()
		made(b, d)
		stop(b, d)
		b.StartTimer()
	}
	b.StopTimer()
	const peers = 5
	var theirs []time.Duration
	for range peers {
		theirs = append(theirs, setup(b, root))
	}
	b.ReportMetric(float64(median(ours).Microseconds())/1000, "ms")
	b.ReportMetric(float64(median(theirs))/float64(median(ours)), "x-faster")
	b.ReportMetric(0, "ns/op") // the loop's mean counts nothing here
}

// BenchmarkGuestSelfTest: ms is how long a guest's driver waits for the test that it asks for after a start, in the middle; x-faster
// how many times longer it waits where nobody had the TPM test itself before.
func BenchmarkGuestSelfTest(b *testing.B) {
	m := newManager(b, stateDir(b))
	d := start(b, m, guestA, "")
	defer stop(b, d)
	made(b, d)
	once := func(ahead bool) time.Duration {
		if err := d.Reset(b.Context(), Fixed(boot(b, ""))); err != nil {
			b.Fatal(err)
		}
		if ahead {
			if err := d.SelfTest(b.Context()); err != nil {
				b.Fatal(err)
			}
		}
		begin := time.Now()
		if rsp, err := (guest{d}).Send(selfTest()); err != nil || engine.ResponseCode(rsp) != tpm2.TPMRCSuccess {
			b.Fatalf("%x, %v", rsp, err)
		}
		return time.Since(begin)
	}
	var ours, theirs []time.Duration
	for b.Loop() {
		ours, theirs = append(ours, once(true)), append(theirs, once(false))
	}
	b.ReportMetric(float64(median(ours).Microseconds())/1000, "ms")
	b.ReportMetric(float64(median(theirs))/float64(median(ours)), "x-faster")
	b.ReportMetric(0, "ns/op")
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

// setup is the time that swtpm_setup takes to make a vTPM and swtpm to start on it.
func setup(b *testing.B, root *debian.Root) time.Duration {
	b.Helper()
	dir := b.TempDir()
	// Its own certificate authority, beneath dir, so that nothing on the host is touched.
	write := func(name, text string) string {
		f := filepath.Join(dir, name)
		if err := os.WriteFile(f, []byte(text), 0o600); err != nil {
			b.Fatal(err)
		}
		return f
	}
	ca := write("ca.conf", fmt.Sprintf("statedir = %[1]s\nsigningkey = %[1]s/key.pem\nissuercert = %[1]s/ca.pem\ncertserial = %[1]s/serial\n", dir))
	opts := write("ca.options", "--platform-manufacturer Redoubt\n--platform-version 1\n--platform-model test\n")
	conf := write("setup.conf", fmt.Sprintf("create_certs_tool = %s\ncreate_certs_tool_config = %s\ncreate_certs_tool_options = %s\n", root.Path("/usr/bin/swtpm_localca"), ca, opts))
	key := keys.New() // as encrypted as ours
	keyFile := write("key", hex.EncodeToString(key[:]))
	state := filepath.Join(dir, "state")
	if err := os.Mkdir(state, 0o700); err != nil {
		b.Fatal(err)
	}
	run := func() time.Duration {
		cmd := root.Command(b.Context(), "swtpm_setup", "--tpm2", "--tpmstate", state, "--config", conf,
			"--createek", "--create-ek-cert", "--create-platform-cert", "--ecc", "--overwrite",
			"--keyfile", keyFile, "--cipher", "aes-256-cbc",
			"--tpm", root.Path("/usr/bin/swtpm")+" socket")
		cmd.Env = append(cmd.Env, "PATH="+root.Path("usr/bin")+":"+os.Getenv("PATH"))
		begin := time.Now()
		if out, err := cmd.CombinedOutput(); err != nil {
			b.Fatalf("swtpm_setup: %v\n%s", err, out)
		}
		return time.Since(begin)
	}
	run() // makes the certificate authority, which a host has already
	took := run()
	begin := time.Now()
	e, err := engine.Start(b.Context(), engine.Config{Dir: state, Key: key, Existing: true})
	if err != nil {
		b.Fatal(err)
	}
	if err := e.Startup(b.Context()); err != nil {
		b.Fatal(err)
	}
	took += time.Since(begin)
	e.Kill()
	return took
}
