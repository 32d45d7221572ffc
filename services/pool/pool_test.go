package pool

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Files are opened beneath the pool and by no link, whoever made it.
func TestPool(t *testing.T) {
	dir := t.TempDir()
	pool, outside := filepath.Join(dir, "pool"), filepath.Join(dir, "outside")
	for _, d := range []string{pool, pool + "/sub", outside} {
		must(t, os.Mkdir(d, 0o755))
	}
	for _, f := range []string{pool + "/disk", pool + "/sub/disk", outside + "/disk"} {
		must(t, os.WriteFile(f, nil, 0o600))
	}
	must(t, os.Symlink(outside, pool+"/way"))
	must(t, os.Symlink(outside+"/disk", pool+"/link"))
	must(t, os.Symlink("disk", pool+"/inside"))
	for path, want := range map[string]string{
		pool + "/disk": "", pool + "/sub/disk": "", pool + "/sub/../disk": "",
		outside + "/disk": "outside the pool", pool + "/../outside/disk": "outside the pool", "disk": "outside the pool",
		pool + "/way/disk": "symbolic link", pool + "/link": "symbolic link", pool + "/inside": "symbolic link",
		pool + "/sub": "not a regular file", pool + "/none": "no such file", pool: "not a regular file",
		"/proc/self/root" + pool + "/disk": "outside the pool",
	} {
		f, err := OpenFile(pool, path, false)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", path, err, want)
		}
		if err == nil {
			f.Close()
		}
	}
}
