package measure

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"redoubt.dev/redoubt/memfd"
	"redoubt.dev/redoubt/services/emulator/kept"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/spec"
)

func sealed(t *testing.T, text string) *os.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m, err := memfd.Sealed("file", f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// TestConfiguration: the machine is measured in one form, in which a guest without modules' isolation is what it always was;
// of its modules all is in it that decides what they may do, and not where the file with it lies.
func TestConfiguration(t *testing.T) {
	g := &kept.Guest{Emulator: spec.Native, Build: protocol.Build{Spec: spec.Guest{
		Name: "web", CPUs: 1, Memory: 256 << 20, Boot: spec.Boot{Kernel: "/k"}, Disks: []spec.Disk{{Path: "/d", ReadOnly: true}},
	}}, Kernel: sealed(t, "kernel")}
	logs := map[string]string{}
	check := func(what, want string) {
		t.Helper()
		got, err := configuration(g)
		if err != nil || string(got) != want {
			t.Errorf("%s: %s, %v, want %s", what, got, err, want)
		}
		for range 2 { // a reboot gives the same
			log, err := Log(g)
			if err != nil || !bytes.Contains(log, got) {
				t.Errorf("%s: %v, the log has not its configuration", what, err)
			}
			if other := logs[string(log)]; other != "" && other != what {
				t.Errorf("%s is measured as %s", what, other)
			}
			logs[string(log)] = what
		}
	}
	const plain = `{"emulator":"native","cpus":1,"memory":"256MiB","disksReadOnly":[true]`
	check("not isolated", plain+"}")
	g.Build.Spec.Modules = &spec.Modules{Default: spec.Isolate, Mode: spec.Enforce}
	check("isolated", plain+`,"modules":{"default":"isolate","mode":"enforce"}}`)
	g.Build.Spec.Modules.Trusted = []string{"ext4", "virtio_net"}
	check("trusted", plain+`,"modules":{"default":"isolate","trusted":["ext4","virtio_net"],"mode":"enforce"}}`)
	g.Build.Spec.Modules.Profile = "/srv/profile.yaml"
	for _, text := range []string{"module: a\n", "module: b\n"} {
		g.Profile = sealed(t, text)
		check("profile "+text, plain+fmt.Sprintf(`,"modules":{"default":"isolate","trusted":["ext4","virtio_net"],"mode":"enforce","profileSHA256":"%x"}}`,
			sha256.Sum256([]byte(text))))
	}
	g.Build.Spec.Modules.Profile = "/elsewhere/profile.yaml"
	check("profile module: b\n", plain+fmt.Sprintf(`,"modules":{"default":"isolate","trusted":["ext4","virtio_net"],"mode":"enforce","profileSHA256":"%x"}}`,
		sha256.Sum256([]byte("module: b\n"))))
}
