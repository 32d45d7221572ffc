package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/term"

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
		RunE: func(c *cobra.Command, args []string) error {
			s, err := a.client().Logs(c.Context(), &v1.LogsRequest{Name: args[0], Follow: follow})
			if err != nil {
				return err
			}
			defer func() { _ = s.Close() }()
			for s.Receive() {
				b := s.Msg().Output
				if a.json {
					if err := json.NewEncoder(a.out).Encode(map[string]string{"guest": args[0], "output": string(b)}); err != nil {
						return err
					}
					continue
				}
				if _, err := a.out.Write(b); err != nil {
					return err
				}
			}
			return streamEnd(c.Context(), s.Err())
		},
	}
	c.Flags().BoolVarP(&follow, "follow", "f", false, "go on until the guest is down")
	return c
}

// streamEnd: leaving a stream with Ctrl-C is no failure.
func streamEnd(ctx context.Context, err error) error {
	left := ctx.Err() != nil || connect.CodeOf(err) == connect.CodeCanceled
	if !left {
		return err
	}
	return nil
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
			s, err := a.client().Events(c.Context(), req)
			if err != nil {
				return err
			}
			defer func() { _ = s.Close() }()
			for s.Receive() {
				e := eventToJSON(s.Msg().Event)
				if a.json {
					if err := json.NewEncoder(a.out).Encode(e); err != nil {
						return err
					}
					continue
				}
				what := moments[e.Kind]
				if what == "" {
					what = e.Kind
				}
				if e.Text != "" {
					what += " (" + printable(e.Text) + ")"
				}
				if _, err := fmt.Fprintf(a.out, "%s  %-16s %s\n", e.Time.Format(time.RFC3339Nano), e.Guest, what); err != nil {
					return err
				}
			}
			return streamEnd(c.Context(), s.Err())
		},
	}
	c.Flags().BoolVarP(&follow, "follow", "f", false, "go on until interrupted")
	return c
}
