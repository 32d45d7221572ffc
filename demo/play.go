package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// demo is one performance.
type demo struct {
	*host
	to io.Writer
	wg sync.WaitGroup // the guests being followed

	late  time.Duration // how late a vTPM has to be
	boots map[string]*boot
	fence *performance // nil: not begun

	shopSpec string // of the guest that is validated, what is special about it
}

// A step shows one thing. It fails with the reason; what needs it is then not tried.
type step struct {
	title string
	needs []string // steps, by their do's name
	name  string
	do    func(*demo, context.Context) error
}

// play runs the steps and returns how many went as they should. The end of ctx ends it.
func (d *demo) play(ctx context.Context, all []step) (ok int) {
	good := map[string]bool{}
	for i, s := range all {
		d.say("")
		d.say("[%d/%d] %s", i+1, len(all), s.title)
		begin := time.Now()
		err := context.Cause(ctx)
		for _, n := range s.needs {
			if err == nil && !good[n] {
				err = errNotReached
			}
		}
		if err == nil {
			err = s.do(d, ctx)
		}
		took := time.Since(begin).Seconds()
		switch {
		case err == nil:
			good[s.name] = true
			ok++
			d.say("  ok (%.1f s)", took)
		case errors.Is(err, errNotReached):
			d.say("  FAILED: %v", err)
		case ctx.Err() != nil:
			d.say("  FAILED: %v", context.Cause(ctx))
			return ok
		default:
			d.say("  FAILED: %v (%.1f s)", err, took)
			d.logs()
		}
	}
	d.say("")
	return ok
}

var errNotReached = errors.New("a step before it failed")

// width bounds what is shown of a line.
const width = 110

// say prints a line.
func (d *demo) say(format string, args ...any) { fmt.Fprintf(d.to, format+"\n", args...) }

// quote prints what a program said, indented, long lines cut.
func (d *demo) quote(text string) {
	for l := range strings.Lines(text) {
		l = strings.TrimRight(l, "\r\n")
		if r := []rune(l); len(r) > width {
			l = string(r[:width-1]) + "…"
		}
		d.say("  | %s", l)
	}
}

// run shows a command line and runs it.
func (d *demo) run(ctx context.Context, args ...string) (string, error) {
	d.say("  $ redoubt %s", strings.Join(args, " "))
	return d.redoubt(ctx, args...)
}

// logs shows the last words of the services, after a failure.
func (d *demo) logs() {
	files, _ := filepath.Glob(d.path("run", "log", "*.log")) // the pattern is a good one
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil || len(b) == 0 {
			continue
		}
		const last = 12
		lines := strings.Split(strings.TrimSpace(string(b)), "\n")
		d.say("  %s:", filepath.Base(f))
		d.quote(strings.Join(lines[max(0, len(lines)-last):], "\n"))
	}
}

// tidyTime bounds the end of everything.
const tidyTime = 45 * time.Second

// tidy ends what still runs and removes the demo's directories.
func (d *demo) tidy() error {
	// Not the demo's context: that may have ended, and what it started must end all the same.
	ctx, cancel := context.WithTimeout(context.Background(), tidyTime)
	defer cancel()
	_, err := d.redoubt(ctx, "down", "--grace", "0s")
	d.wg.Wait() // a console ends with its guest
	return errors.Join(err, os.RemoveAll(d.dir))
}
