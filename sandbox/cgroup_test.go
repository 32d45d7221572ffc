package sandbox

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestLeftGroups: what is left of groups by who was killed is no hindrance to who has its process number later, and is swept away;
// what is not left stays.
func TestLeftGroups(t *testing.T) {
	own, err := FindCgroup()
	if err != nil {
		t.Fatal(err)
	}
	c, err := own.child("left", 64<<20) // a place of the test's own: others sweep, too
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.remove(); err != nil {
			t.Error(err)
		}
	}()
	place := &Cgroup{c.dir, c.v2}
	if c.v2 {
		if err := place.delegate(); err != nil {
			t.Fatal(err)
		}
	}
	dead := exec.Command("true")
	if err := dead.Run(); err != nil {
		t.Fatal(err)
	}
	made := func(name string) string {
		t.Helper()
		dir := filepath.Join(place.dir, name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	next := groups.Load() + 1
	left := []string{made(fmt.Sprintf("redoubt-test-%d-1", dead.Process.Pid)), made(fmt.Sprintf("redoubt-a-test-%d-2", dead.Process.Pid))}
	ours := []string{
		made(fmt.Sprintf("redoubt-test-%d-%d", os.Getpid(), next)), made("redoubt-main"), made("redoubt-x-y-z"),
		made(fmt.Sprintf("other-test-%d-1", dead.Process.Pid)),
	}
	g, err := place.child("test", 64<<20)
	if err != nil {
		t.Fatalf("a name that is taken: %v", err)
	}
	used, err := place.child("used", 64<<20)
	if err != nil {
		t.Fatal(err)
	}
	sleeper := exec.Command("sleep", "1000")
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	if err := used.add(sleeper.Process.Pid); err != nil {
		t.Error(err)
	}
	running := filepath.Join(place.dir, fmt.Sprintf("redoubt-runs-%d-3", dead.Process.Pid))
	if err := os.Rename(used.dir, running); err != nil {
		t.Error(err)
	}
	if n := place.Sweep(); n != len(left) {
		t.Errorf("%d groups swept away, want %d", n, len(left))
	}
	for _, dir := range left {
		if _, err := os.Stat(dir); !os.IsNotExist(err) {
			t.Errorf("%s: %v", dir, err)
		}
	}
	for _, dir := range append(ours, g.dir, running) {
		if _, err := os.Stat(dir); err != nil {
			t.Error(err)
		}
	}
	_ = sleeper.Process.Kill()
	_ = sleeper.Wait()
	for _, dir := range append(ours, g.dir, running) {
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	}
}
