package crossview

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/validation/baseline"
	"redoubt.dev/redoubt/validation/ext4"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// tool runs a program of e2fsprogs: from the cache, or the host's.
func tool(t testing.TB, name string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	if root, err := debian.Open(); err == nil {
		if c := root.Command(ctx, name, args...); c.Err == nil {
			if _, err := os.Stat(c.Path); err == nil {
				cmd = c
			}
		}
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s (Debian: e2fsprogs; run `make fetch`): %v\n%s", name, err, out)
	}
}

// A root is a guest's: its image, and what find says in it.
type root struct {
	t       testing.TB
	image   string
	listing []string
	begun   time.Time
}

func newRoot(t testing.TB, files map[string]string, size string) *root {
	t.Helper()
	dir := t.TempDir()
	r := &root{t: t, image: filepath.Join(t.TempDir(), "image"), begun: time.Now().Add(time.Hour)}
	for path, text := range files {
		must(t, os.MkdirAll(filepath.Join(dir, filepath.Dir(path)), 0o755))
		must(t, os.WriteFile(filepath.Join(dir, path), []byte(text), 0o644))
	}
	tool(t, "mke2fs", "-q", "-F", "-t", "ext4", "-I", "256", "-d", dir, r.image, size)
	must(t, filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		r.listing = append(r.listing, "/"+strings.TrimPrefix(strings.TrimPrefix(path, dir), "/"))
		return err
	}))
	r.listing = append(r.listing, "/lost+found")
	return r
}

// debugfs changes the image.
func (r *root) debugfs(command string) { tool(r.t, "debugfs", "-w", "-R", command, r.image) }

// without is the listing but for some names and what is in them.
func (r *root) without(paths ...string) []string {
	var left []string
	for _, n := range r.listing {
		if !slices.ContainsFunc(paths, func(p string) bool { return n == p || strings.HasPrefix(n, p+"/") }) {
			left = append(left, n)
		}
	}
	return left
}

func (r *root) compare(listing []string, change func(*Options)) Result {
	r.t.Helper()
	b, err := os.ReadFile(r.image)
	must(r.t, err)
	fs, err := ext4.Open(bytes.NewReader(b), int64(len(b)), ext4.Options{})
	must(r.t, err)
	l, err := Parse([]byte(strings.Join(listing, "\x00") + "\x00"))
	must(r.t, err)
	o := Options{Volume: "disk0", Listing: l, Rules: baseline.DefaultRules(), Begun: r.begun, Taken: r.begun.Add(time.Minute), Most: 100}
	if change != nil {
		change(&o)
	}
	got, err := Compare(r.t.Context(), fs, o)
	must(r.t, err)
	return got
}

func (r *root) want(got Result, want ...string) {
	r.t.Helper()
	var found []string
	for _, f := range got.Findings {
		found = append(found, strings.TrimSpace(fmt.Sprintf("%s %s %s %s", f.Severity, f.Kind, f.Name.Path, f.Rule)))
	}
	slices.Sort(found)
	want = slices.Sorted(slices.Values(want))
	if !slices.Equal(found, want) {
		r.t.Errorf("found\n%s\nnot\n%s", strings.Join(found, "\n"), strings.Join(want, "\n"))
	}
}

var system = map[string]string{
	"bin/ls": "ls", "usr/lib/x/evil.so": "evil", "usr/lib/x/more/a": "a", "usr/lib/y/b": "b", "etc/hostname": "h", "etc/ssh/sshd_config": "c",
	"opt/kit/a": "a", "opt/kit/sub/b": "b", "home/u/notes": "n", "dev/null": "", "proc/empty": "", "boot/old": "kernel", "data/x/y": "y", "mnt/z": "z",
	"etc/fstab": "UUID=1 / ext4 defaults 0 1\n/dev/vdb /data ext4\n/dev/vdc /boot ext4\n",
}

// TestHidden: what a listing leaves out is found, as severe as its rule says, a whole directory once, and nothing else.
func TestHidden(t *testing.T) {
	r := newRoot(t, system, "16M")
	r.want(r.compare(r.listing, nil))
	r.want(r.compare(r.without("/usr/lib/x/evil.so", "/opt/kit", "/etc/hostname", "/home/u/notes"), nil),
		"critical hidden /usr/lib/x/evil.so programs", "critical hidden /opt/kit", "warning hidden /etc/hostname configuration", "critical hidden /home/u/notes")

	// All of a directory that is no mount point.
	got := r.compare(r.without("/usr/lib/x/evil.so", "/usr/lib/x/more", "/mnt/z"), nil)
	r.want(got, "critical hidden /usr/lib/x/evil.so programs", "critical hidden /usr/lib/x/more programs", "critical hidden /mnt/z")
	if f := got.Findings[1]; f.Is != "file 0644 0:0 4 bytes" {
		t.Errorf("it is %q", f.Is)
	}

	// What is left out, and what is said of it instead.
	rules, err := baseline.ParseRules([]byte("rules:\n- name: quiet\n  include: [/opt]\n  ignore: true\n- name: homes\n  include: [/home]\n  severity: info\n"))
	must(t, err)
	with := func(o *Options) { o.Rules = rules }
	r.want(r.compare(r.without("/opt/kit", "/home/u", "/bin"), with), "info hidden /home/u homes", "critical hidden /bin")

	// The worst of those that are too many.
	got = r.compare(r.without("/etc/hostname", "/etc/fstab", "/bin/ls", "/usr"), func(o *Options) { o.Most = 2 })
	if got.Omitted != 2 {
		t.Errorf("%d omitted", got.Omitted)
	}
	for _, f := range got.Findings {
		if f.Severity != baseline.Critical {
			t.Errorf("it keeps %v", f)
		}
	}
}

// TestMounts: what lies below a mount point is told once, less severely where no rule is for it; where a listing shows something
// below, nothing is mounted.
func TestMounts(t *testing.T) {
	r := newRoot(t, system, "16M")
	got := r.compare(r.without("/dev/null", "/proc/empty", "/data/x", "/boot/old"), nil)
	r.want(got, "warning hidden /dev", "warning hidden /proc", "warning hidden /data", "critical hidden /boot boot")
	if f := got.Findings[1]; f.Is != "hidden by what is mounted there: 1 names, such as x" {
		t.Errorf("it is %q", f.Is)
	}
	r.want(r.compare(append(r.without("/dev/null"), "/dev/tty"), nil), "critical hidden /dev/null")
	r.want(r.compare(r.without("/dev"), nil), "critical hidden /dev")
	// Without the line of fstab it is as if hidden.
	r.debugfs("rm /etc/fstab")
	r.want(r.compare(r.without("/data/x"), nil), "critical hidden /data/x")
}

// TestSince: what was made, renamed or changed after the listing was begun is not called hidden, but counted; a time that is not
// yet is no excuse.
func TestSince(t *testing.T) {
	r := newRoot(t, system, "16M")
	missing := r.without("/opt/kit/a", "/opt/kit/sub", "/bin/ls", "/usr/lib/y/b", "/home/u")
	all := []string{"critical hidden /opt/kit/a", "critical hidden /opt/kit/sub", "critical hidden /bin/ls programs", "critical hidden /usr/lib/y/b programs", "critical hidden /home/u"}
	r.want(r.compare(missing, nil), all...)
	later := fmt.Sprintf("@%d", r.begun.Add(10*time.Second).Unix())
	set := func(path, field, to string) { r.debugfs(fmt.Sprintf("set_inode_field %s %s %s", path, field, to)) }
	set("/opt/kit/a", "crtime", later)
	set("/opt/kit/sub", "ctime", later)
	set("/usr/lib/y", "ctime", later) // it may have been moved there
	got := r.compare(missing, nil)
	r.want(got, "critical hidden /bin/ls programs", "critical hidden /home/u")
	if got.Unjudged != 3 || len(got.Some) != 3 {
		t.Errorf("%d were not judged: %v", got.Unjudged, got.Some)
	}
	set("/usr/lib/y", "mtime", later) // something came or went in it
	set("/bin/ls", "ctime", fmt.Sprintf("@%d", r.begun.Add(10*24*time.Hour).Unix()))
	r.want(r.compare(missing, nil), "critical hidden /bin/ls programs", "critical hidden /home/u", "critical hidden /usr/lib/y/b programs")
	// A listing that was begun later has no such excuse.
	r.want(r.compare(missing, func(o *Options) { o.Begun = r.begun.Add(time.Minute) }), all...)
}

// TestDamaged: a directory that cannot be read is a finding: nobody knows what is in it. Neither a loop nor an end of patience
// keeps from the answer.
func TestDamaged(t *testing.T) {
	r := newRoot(t, system, "16M")
	r.debugfs("clri /opt/kit/a")
	r.want(r.compare(r.without("/opt/kit/a"), nil), "critical hidden /opt/kit/a")
	r.debugfs("link /usr /opt/usr") // a second name of a directory
	listing := append(slices.Clone(r.listing), "/opt/usr", "/opt/usr/lib")
	r.want(r.compare(listing, nil), "critical unreadable /opt/usr")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	b, err := os.ReadFile(r.image)
	must(t, err)
	fs, err := ext4.Open(bytes.NewReader(b), int64(len(b)), ext4.Options{})
	must(t, err)
	l, err := Parse([]byte("/\n"))
	must(t, err)
	if _, err := Compare(ctx, fs, Options{Listing: l, Rules: baseline.DefaultRules()}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
