package lab

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"
)

// One boot carries output, status, directory and environment, and keeps them out of the
// command's reach of quoting.
func TestLabRun(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("of the host\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	status, err := Run(ctx, Job{
		Args: []string{"/bin/sh", "-c", `cat file; echo "$WORD $REDOUBT_IN_LAB"; echo scribble >file; echo err >&2
			test -c /dev/kvm && test -d /sys/module/kvm_amd && echo kvm; exit 7`},
		Dir: dir, Env: []string{"PATH=/usr/bin:/bin", "WORD=it's $HOME"}, Output: &out,
	})
	if err != nil {
		t.Fatal(err)
	}
	if want := "of the host\nit's $HOME 1\nerr\nkvm\n"; status != 7 || out.String() != want {
		t.Errorf("status %d, output %q, want 7 and %q", status, out.String(), want)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || string(b) != "of the host\n" {
		t.Errorf("the host's file became %q, %v", b, err)
	}
}

// The time limit ends the machine and says so.
func TestLabTimeLimit(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	var out bytes.Buffer
	_, err := Run(ctx, Job{Args: []string{"/bin/true"}, Output: &out})
	if err == nil || !strings.Contains(err.Error(), "deadline") {
		t.Errorf("error %v", err)
	}
}

func TestQuote(t *testing.T) {
	for _, s := range []string{"", "plain", "it's", "$(x) `y` \\ \" \n", "''"} {
		out, err := exec.CommandContext(t.Context(), "/bin/sh", "-c", "printf %s "+quote(s)).Output()
		if err != nil || string(out) != s {
			t.Errorf("%q comes back as %q, %v", s, out, err)
		}
	}
}

func TestCallers(t *testing.T) {
	file := filepath.Join(t.TempDir(), "x_test.go")
	src := `package x
func TestA(t *testing.T) { lab.NeedsKVM(t); if true {} }
func TestB(t *testing.T) {}
func BenchmarkC(b *testing.B) { if x { lab.NeedsKVM(b) } }
func helper(t *testing.T) { lab.NeedsKVM(t) }
`
	if err := os.WriteFile(file, []byte(src), 0o644); err != nil {
		t.Fatal(err)
	}
	got, err := callers(file)
	if want := []string{"TestA", "BenchmarkC"}; err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("callers %v, %v; want %v", got, err, want)
	}
}

// verdict records what NeedsKVM decided.
type verdict string

func (*verdict) Helper()        {}
func (v *verdict) Skip(...any)  { *v = "skip" }
func (v *verdict) Fatal(...any) { *v = "fatal" }

// Without KVM a test fails, unless a later run in the lab was promised; in the lab there is no
// later.
func TestNeedsKVM(t *testing.T) {
	if KVM() {
		t.Log("KVM is usable here: NeedsKVM lets every test run that is not promised for later")
	}
	for _, c := range []struct {
		in, later string
		want      verdict
	}{
		{"", "", "fatal"}, {"", "1", "skip"}, {"1", "1", "fatal"}, {"1", "", "fatal"},
	} {
		t.Setenv(InLab, c.in)
		t.Setenv(Later, c.later)
		var v verdict
		NeedsKVM(&v)
		if KVM() && c.want == "fatal" {
			c.want = ""
		}
		if KVM() && c.later == "1" {
			c.want = "skip"
		}
		if want := c.want; v != want {
			t.Errorf("in the lab %q, later %q: %q, want %q", c.in, c.later, v, want)
		}
	}
}

// Each test is in one share, and the shares cost about the same.
func TestShares(t *testing.T) {
	var all []testPackage
	for name, n := range map[string]int{"x/e2e": 19, "x/monitor": 19, "x/kvm": 4, "x/network": 1} {
		p := testPackage{path: name}
		for i := range n {
			p.tests = append(p.tests, fmt.Sprint(name, i))
		}
		all = append(all, p)
	}
	for n := 1; n <= 4; n++ {
		seen := map[string]int{}
		got := shares(all, n)
		if len(got) != n {
			t.Errorf("%d machines: %d shares", n, len(got))
		}
		for _, share := range got {
			cost := 0
			for _, p := range share {
				for _, test := range p.tests {
					seen[test]++
					cost++
					if p.path == "x/e2e" {
						cost += starting - 1
					}
				}
			}
			if want := (19*starting + 24) / n; cost < want-2*starting || cost > want+2*starting {
				t.Errorf("%d machines: a share costs %d, about %d would be fair", n, cost, want)
			}
		}
		for test, times := range seen {
			if times != 1 {
				t.Errorf("%d machines: %s is run %d times", n, test, times)
			}
		}
		if len(seen) != 43 {
			t.Errorf("%d machines: %d tests of 43", n, len(seen))
		}
	}
	if got := shares(nil, 2); len(got) != 0 {
		t.Errorf("nothing is shared as %v", got)
	}
}

// Two machines' lines do not mix, and none is lost.
func TestLines(t *testing.T) {
	var out bytes.Buffer
	var mu sync.Mutex
	a, b := &lines{mu: &mu, to: &out}, &lines{mu: &mu, to: &out}
	for _, w := range []struct {
		l    *lines
		text string
	}{{a, "one "}, {b, "two\nthr"}, {a, "line\nand"}, {b, "ee\n"}} {
		if n, err := w.l.Write([]byte(w.text)); n != len(w.text) || err != nil {
			t.Fatalf("%d, %v", n, err)
		}
	}
	a.flush()
	b.flush()
	if want := "two\none line\nthree\nand\n"; out.String() != want {
		t.Errorf("%q, want %q", out.String(), want)
	}
}
