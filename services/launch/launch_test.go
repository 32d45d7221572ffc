package launch

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"redoubt.dev/redoubt/sandbox"
	"redoubt.dev/redoubt/services"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestUsers: no two processes that run have one user; a service with a directory, of which there is
// one, has the same for ever, and is not started twice.
func TestUsers(t *testing.T) {
	l := New(t.TempDir(), 0, nil, sandbox.Host{})
	store, err := services.Find(services.StoreState)
	must(t, err)
	back, err := services.Find(services.BlkBack)
	must(t, err)
	first, err := l.take(store)
	must(t, err)
	if first.user != l.User(store) || first.user < services.DefaultUsers || first.user >= services.DefaultUsers+firstFree {
		t.Errorf("user %d", first.user)
	}
	if _, err := l.take(store); err == nil || !strings.Contains(err.Error(), "runs already") {
		t.Errorf("a second store: %v", err)
	}
	// Its end is known by Done before release comes.
	done := make(chan struct{})
	l.note(first, &sandbox.Spec{Name: "store-state"}, done)
	close(done)
	second, err := l.take(store)
	must(t, err)
	l.release(first) // late: the user is the second's now
	if _, err := l.take(store); err == nil || second.user != first.user {
		t.Error("the late end of the first freed the second's user")
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	seen := map[uint32]bool{}
	for range 8 {
		wg.Go(func() {
			for range 100 {
				i, err := l.take(back)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				if seen[i.user] || i.user < services.DefaultUsers+firstFree || i.user >= services.DefaultUsers+users {
					t.Errorf("user %d", i.user)
				}
				seen[i.user] = true
				mu.Unlock()
			}
		})
	}
	wg.Wait()
}

func TestUsersRunOut(t *testing.T) {
	l := New(t.TempDir(), 1000, nil, sandbox.Host{})
	back, err := services.Find(services.BlkBack)
	must(t, err)
	var last *instance
	for range users - firstFree {
		last, err = l.take(back)
		must(t, err)
	}
	if _, err := l.take(back); err == nil {
		t.Fatal("more than there are")
	}
	l.release(last)
	if i, err := l.take(back); err != nil || i.user != last.user {
		t.Fatalf("%v, %v", i, err)
	}
}

// TestGive: a directory and all in it become a user's, but nothing with a second name, which could be
// somebody else's file, and nothing that a link names.
func TestGive(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, as `make test` is run by: it gives files away")
	}
	dir := t.TempDir()
	outside := filepath.Join(dir, "outside")
	must(t, os.WriteFile(outside, nil, 0o600))
	tree := func(name string) string {
		d := filepath.Join(dir, name)
		must(t, os.MkdirAll(filepath.Join(d, "sub"), 0o700))
		must(t, os.WriteFile(filepath.Join(d, "sub", "file"), nil, 0o600))
		return d
	}
	d := tree("good")
	must(t, give(d, 4711, 4712))
	for _, p := range []string{d, filepath.Join(d, "sub"), filepath.Join(d, "sub", "file")} {
		st, err := os.Stat(p)
		must(t, err)
		if Owner(st) != [2]uint32{4711, 4712} {
			t.Errorf("%s: %v", p, Owner(st))
		}
	}
	for name, plant := range map[string]func(string) error{
		"hard link": func(p string) error { return os.Link(outside, p) },
		"link":      func(p string) error { return os.Symlink(outside, p) },
	} {
		d := tree(name)
		must(t, plant(filepath.Join(d, "sub", "a")))
		if err := give(d, 4711, 4712); err == nil || !strings.Contains(err.Error(), "one name") {
			t.Errorf("%s: %v", name, err)
		}
	}
	st, err := os.Stat(outside)
	must(t, err)
	if Owner(st) != [2]uint32{0, 0} {
		t.Errorf("outside: %v", Owner(st))
	}
}
