package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"redoubt.dev/redoubt/api"
	v1 "redoubt.dev/redoubt/api/redoubt/v1"
)

// escape leaves the console, as telnet's does: Ctrl-].
const escape = 0x1d

func (a *app) consoleCommand() *cobra.Command {
	var channel bool
	c := &cobra.Command{
		Use:     "console NAME",
		Short:   "Connect to a guest's serial console",
		Long:    "Connects to a guest's serial console; Ctrl-] leaves. Without a terminal, standard input is\ntyped; it goes on until the guest is down or it is interrupted.",
		Example: "  redoubt console web-1\n  echo uptime | timeout 5 redoubt console web-1\n  redoubt console web-1 --channel",
		Args:    names(1, "a guest's name"),
		RunE:    func(c *cobra.Command, args []string) error { return a.console(c.Context(), args[0], channel) },
	}
	c.Flags().BoolVar(&channel, "channel", false, "the byte channel instead: /dev/virtio-ports/redoubt.0 in the guest")
	return c
}

func (a *app) console(ctx context.Context, name string, channel bool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := a.client().Console(ctx)
	if err != nil {
		return err
	}
	if err := s.Send(&v1.ConsoleRequest{Name: name, Channel: channel}); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	tty := term.IsTerminal(int(os.Stdin.Fd()))
	if tty {
		old, err := term.MakeRaw(int(os.Stdin.Fd()))
		if err != nil {
			return fmt.Errorf("console: %w", err)
		}
		defer func() { _ = term.Restore(int(os.Stdin.Fd()), old) }()
		fmt.Fprintf(a.err, "connected to %s; Ctrl-] leaves\r\n", name)
	}
	left := false
	go func() { // ends with standard input or the process
		defer func() { _ = s.CloseRequest() }()
		buf := make([]byte, 1024)
		for {
			n, err := os.Stdin.Read(buf)
			for i := range n {
				if tty && buf[i] == escape {
					left = true
					cancel()
					return
				}
			}
			if n > 0 && s.Send(&v1.ConsoleRequest{Input: buf[:n]}) != nil {
				return
			}
			if err != nil {
				return
			}
		}
	}()
	for {
		m, err := s.Receive()
		if errors.Is(err, io.EOF) || (left && ctx.Err() != nil) {
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := a.out.Write(m.Output); err != nil {
			return err
		}
	}
}

func (a *app) logsCommand() *cobra.Command {
	var follow bool
	c := &cobra.Command{
		Use:     "logs NAME",
		Short:   "Print what a guest's console has printed",
		Example: "  redoubt logs web-1\n  redoubt logs web-1 --follow",
		Args:    names(1, "a guest's name"),
		RunE:    func(c *cobra.Command, args []string) error { return a.logs(c.Context(), args[0], follow) },
	}
	c.Flags().BoolVarP(&follow, "follow", "f", false, "go on until the guest is down")
	return c
}

func (a *app) logs(ctx context.Context, name string, follow bool) error {
	l := log{a: a, name: name}
	for {
		wasDown := false
		if follow { // asked first: a guest that was down before has printed all
			res, err := a.client().Get(ctx, &v1.GetRequest{Name: name})
			if err != nil {
				return streamEnd(ctx, err)
			}
			wasDown = down(res.Guest)
		}
		err := l.once(ctx, follow)
		if !follow || !ended(ctx, err) || (err == nil && wasDown) {
			return streamEnd(ctx, err)
		}
	}
}

// A log is what is printed of a guest's console, by as many streams as it takes.
type log struct {
	a       *app
	name    string
	printed []byte // the last of it
}

// maxPrinted is more than a toolstack keeps of a console, with which a stream begins.
const maxPrinted = 1 << 20

// once prints one stream, but for what was printed of it already.
func (l *log) once(ctx context.Context, follow bool) error {
	s, err := l.a.client().Logs(ctx, &v1.LogsRequest{Name: l.name, Follow: follow})
	if err != nil {
		return err
	}
	defer func() { _ = s.Close() }()
	for first := true; s.Receive(); first = false {
		b := s.Msg().Output
		if first { // all of the past at once
			b = b[overlap(l.printed, b):]
		}
		if len(b) == 0 {
			continue
		}
		if l.a.json {
			err = json.NewEncoder(l.a.out).Encode(map[string]string{"guest": l.name, "output": string(b)})
		} else {
			_, err = l.a.out.Write(b)
		}
		if err != nil {
			return err
		}
		if l.printed = append(l.printed, b...); len(l.printed) > 2*maxPrinted {
			l.printed = bytes.Clone(l.printed[len(l.printed)-maxPrinted:])
		}
	}
	return s.Err()
}

// overlap is how much of next's beginning is printed's end (Knuth, Morris, Pratt). Of more than one answer it is the longest: what a
// guest prints again and again may then be left out once, and is never printed twice.
func overlap(printed, next []byte) int {
	border := make([]int, len(next)+1) // of next's first n bytes: the longest beginning that is their end, too
	border[0] = -1
	for i, n := 0, -1; i < len(next); {
		for n >= 0 && next[i] != next[n] {
			n = border[n]
		}
		i, n = i+1, n+1
		border[i] = n
	}
	n := 0
	for _, c := range printed {
		for n >= 0 && (n == len(next) || next[n] != c) {
			n = border[n]
		}
		n++
	}
	return n
}

// ended says that a stream ended with the toolstack that served it: in order, when it is replaced, or with its death. The next
// one has the same socket, in whose queue a caller waits; where there is none any more, the next call says so.
func ended(ctx context.Context, err error) bool {
	return ctx.Err() == nil && (err == nil || api.Replaced(err))
}

// streamEnd: leaving a stream with Ctrl-C is no failure.
func streamEnd(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil //nolint:nilerr // who leaves knows
	}
	return err
}

func (a *app) eventsCommand() *cobra.Command {
	var follow bool
	c := &cobra.Command{
		Use:     "events [NAME]",
		Short:   "Print what happened to guests",
		Example: "  redoubt events --follow\n  redoubt events web-1 --json",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			req := &v1.EventsRequest{Follow: follow}
			if len(args) == 1 {
				req.Name = args[0]
			}
			last := map[string]int64{}
			for {
				err := a.events(c.Context(), req, last)
				if !follow || !ended(c.Context(), err) {
					return streamEnd(c.Context(), err)
				}
			}
		},
	}
	c.Flags().BoolVarP(&follow, "follow", "f", false, "go on until interrupted")
	return c
}

// events prints one stream, but for what was printed already: last is when the last of it was, by guest. A stream begins with the
// past, in order, in which an event may be twice that happened while the toolstack was replaced.
func (a *app) events(ctx context.Context, req *v1.EventsRequest, last map[string]int64) error {
	s, err := a.client().Events(ctx, req)
	if err != nil {
		return err
	}
	defer func() { _ = s.Close() }()
	before := maps.Clone(last)
	for s.Receive() {
		e := s.Msg().Event
		if e.TimeUnixNano <= before[e.Guest] || e.TimeUnixNano == last[e.Guest] {
			continue
		}
		last[e.Guest] = max(last[e.Guest], e.TimeUnixNano)
		j := eventToJSON(e)
		if a.json {
			err = json.NewEncoder(a.out).Encode(j)
		} else {
			_, err = fmt.Fprintf(a.out, "%s  %-16s %s\n", j.Time.Format(time.RFC3339Nano), printable(j.Guest), moment(e))
		}
		if err != nil {
			return err
		}
	}
	return s.Err()
}

// An input is standard input, or what else may keep a reader waiting, until ctx ends.
type input struct {
	ctx context.Context
	r   io.Reader
}

// Read leaves a goroutine behind where ctx ends first; it ends with the input or the process.
func (i input) Read(p []byte) (int, error) {
	type result struct {
		n   int
		err error
	}
	done := make(chan result, 1)
	buf := make([]byte, min(len(p), 64<<10))
	go func() {
		n, err := i.r.Read(buf)
		done <- result{n, err}
	}()
	select {
	case r := <-done:
		return copy(p, buf[:r.n]), r.err
	case <-i.ctx.Done():
		return 0, i.ctx.Err()
	}
}
