package backend_test

import (
	"context"
	"testing"
	"time"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/vtpm/backend"
	"redoubt.dev/redoubt/vtpm/channel"
	"redoubt.dev/redoubt/vtpm/frontend"
)

// TestResume: a guest whose back end was killed, in whatever it was, has its command answered by the
// next one and goes on.
func TestResume(t *testing.T) {
	const other = guest + 1
	for name, killed := range map[string]func(t *testing.T, last *channel.Conn, sent <-chan error){
		"before it told that the gate is open": func(*testing.T, *channel.Conn, <-chan error) {},
		"before it read the command": func(t *testing.T, last *channel.Conn, _ <-chan error) {
			sendFrame(t, last, channel.Frame{Kind: channel.Open})
		},
		"with the command": func(t *testing.T, last *channel.Conn, _ <-chan error) {
			sendFrame(t, last, channel.Frame{Kind: channel.Open})
			if f, err := last.Receive(); err != nil || f.Kind != channel.Command || f.Seq != 1 {
				t.Fatal(f, err)
			}
		},
		"after it answered": func(t *testing.T, last *channel.Conn, sent <-chan error) {
			sendFrame(t, last, channel.Frame{Kind: channel.Open})
			f, err := last.Receive()
			if err != nil {
				t.Fatal(err)
			}
			sendFrame(t, last, channel.Frame{Kind: channel.Reply, Seq: f.Seq, Data: make([]byte, 10)})
			if err := await(t, sent); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, backend.Options{})
			a, b, err := ipc.Pipe()
			w.must(err)
			left, err := a.File()
			w.must(err)
			fe := frontend.New(channel.New(b), frontend.Options{Guest: w, PauseAfter: time.Minute})
			defer fe.Close()
			sent := make(chan error, 1)
			go func() {
				_, err := fe.Execute(0, command)
				sent <- err
			}()
			killed(t, channel.New(a), sent)

			ch, err := channel.FromFile(left)
			w.must(err)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			next, err := w.hub.Resume(ctx, backend.Options{Domain: other, Channel: ch, Report: func(string) {}}, w.tpm, []byte("log"))
			w.must(err)
			if name != "after it answered" {
				w.must(await(t, sent))
			}
			if _, err := fe.Execute(0, command); err != nil {
				t.Error(err)
			}
			next.Close()
			if _, err := fe.Execute(0, command); err == nil {
				t.Error("answered by nobody: the end of a back end that is closed is not seen where its descriptor is kept")
			}
		})
	}
}

func sendFrame(t *testing.T, c *channel.Conn, f channel.Frame) {
	t.Helper()
	if err := c.Send(f); err != nil {
		t.Fatal(err)
	}
}
