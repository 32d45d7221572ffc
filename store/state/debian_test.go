package state_test

import (
	"bufio"
	"context"
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/store/state"
)

// xs runs one of Debian's clients.
func (s *store) xs(name string, args ...string) (string, error) {
	s.tb.Helper()
	cmd := s.command(name, args...)
	out, err := cmd.CombinedOutput()
	return strings.TrimRight(string(out), "\n"), err
}

func (s *store) command(name string, args ...string) *exec.Cmd {
	s.tb.Helper()
	root, err := debian.Open()
	must(s.tb, err)
	return root.XenStore(context.Background(), s.socket, name, args...)
}

// TestDebianClients: what Debian's xenstore-utils do, they do with this store.
func TestDebianClients(t *testing.T) {
	s := start(t, state.Options{Workers: inProcess(t)})
	for _, c := range []struct{ cmd, want string }{
		{"xenstore-write /a/b hello /a/c world", ""},
		{"xenstore-read /a/b /a/c", "hello\nworld"},
		{"xenstore-exists /a/b", ""},
		{"xenstore-exists /a/nothing", "exit status 1"},
		{"xenstore-list /a", "b\nc"},
		{"xenstore-list -p /a", "/a/b\n/a/c"},
		{"xenstore-ls /a", "b = \"hello\"\nc = \"world\""},
		{"xenstore-ls -f /a", "/a/b = \"hello\"\n/a/c = \"world\""},
		{"xenstore-ls -f -p /a", "/a/b = \"hello\"   (r0)\n/a/c = \"world\"   (r0)"},
		{"xenstore-chmod /a/b b5 r7 w9", ""},
		{"xenstore-ls -f -p /a", "/a/b = \"hello\"   (b5,r7,w9)\n/a/c = \"world\"   (r0)"},
		{"xenstore-chmod -r /a n3", ""},
		{"xenstore-ls -f -p /a", "/a/b = \"hello\"   (n3)\n/a/c = \"world\"   (n3)"},
		{"xenstore-write relative there", ""},
		{"xenstore-read /local/domain/0/relative", "there"},
		{"xenstore-list /local/domain/0", "relative"},
		{"xenstore-rm /a/b", ""},
		{"xenstore-read /a/b", "xenstore-read: couldn't read path /a/b\nexit status 1"},
		{"xenstore-rm -t /a/c", ""},
		{"xenstore-exists /a", "exit status 1"},
	} {
		f := strings.Fields(c.cmd)
		out, err := s.xs(f[0], f[1:]...)
		if err != nil {
			out = strings.TrimPrefix(out+"\n"+err.Error(), "\n")
		}
		if out != c.want {
			t.Errorf("%s: %q, want %q", c.cmd, out, c.want)
		}
	}
}

// TestDebianWatch: xenstore-watch hears of the watch itself and then of each change.
func TestDebianWatch(t *testing.T) {
	s := start(t, state.Options{Workers: inProcess(t)})
	cmd := s.command("xenstore-watch", "-n", "4", "/w")
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	lines := bufio.NewScanner(out)
	line := func(want string) {
		t.Helper()
		if !lines.Scan() || lines.Text() != want {
			t.Fatalf("%q %v, want %q", lines.Text(), lines.Err(), want)
		}
	}
	line("/w")
	b := s.dial(builder)
	must(t, b.Write("/w/x", "1"))
	line("/w/x")
	must(t, b.Write("/elsewhere", "1"))
	must(t, b.Write("/w", "1"))
	line("/w")
	must(t, b.Remove("/w"))
	line("/w")
	must(t, cmd.Wait())
}

// TestDebianTestXenstore: Debian's own test program, against workers that are programs of
// their own and replaced after each response.
func TestDebianTestXenstore(t *testing.T) {
	for _, c := range []struct {
		name string
		opt  state.Options
		args []string
		runs int
	}{
		{"memory", state.Options{}, []string{"-i", "200"}, 12},
		{"replaced", state.Options{Workers: self(t)}, nil, 12},
		{"random", state.Options{Workers: inProcess(t)}, []string{"-r", "1"}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := start(t, c.opt)
			out, err := s.xs("test-xenstore", c.args...)
			if err != nil || strings.Count(out, " ns") < c.runs || strings.Contains(out, "failed") {
				t.Fatalf("%v\n%s", err, out)
			}
			if names, err := s.dial(builder).List("/local/domain/0"); err != nil || len(names) > 0 {
				t.Errorf("left behind: %v %v", names, err)
			}
			fmt.Fprintln(t.Output(), out)
		})
	}
}
