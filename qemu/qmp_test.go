package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

const greeting = `{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}` + "\r\n"

// A fakeQEMU answers a client's commands as answer says.
type fakeQEMU struct {
	t    *testing.T
	conn net.Conn
	in   *bufio.Reader
}

func newFake(t *testing.T) (*fakeQEMU, net.Conn) {
	a, b := net.Pipe()
	t.Cleanup(func() { _ = a.Close() })
	return &fakeQEMU{t, a, bufio.NewReader(a)}, b
}

func (f *fakeQEMU) send(format string, args ...any) {
	_, _ = fmt.Fprintf(f.conn, format+"\r\n", args...) // the client may have hung up: its error tells
}

// next is the next command's name and id.
func (f *fakeQEMU) next() (string, uint64) {
	line, err := f.in.ReadBytes('\n')
	if err != nil {
		return "", 0
	}
	var r request
	if err := json.Unmarshal(line, &r); err != nil {
		f.t.Errorf("client sent %q: %v", line, err)
	}
	return r.Execute, r.ID
}

// greet negotiates.
func (f *fakeQEMU) greet() {
	_, _ = io.WriteString(f.conn, greeting)
	name, id := f.next()
	if name != "qmp_capabilities" {
		f.t.Errorf("first command %q", name)
	}
	f.send(`{"return": {}, "id": %d}`, id)
}

// dial connects a client to a fake that greets and then does what serve says.
func dial(t *testing.T, onEvent func(Event), serve func(*fakeQEMU)) *Client {
	t.Helper()
	f, conn := newFake(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		f.greet()
		serve(f)
	}()
	c, err := NewClient(t.Context(), conn, onEvent)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.Close()
		_ = f.conn.Close()
		<-done
	})
	return c
}

// Commands of many goroutines, answered in reverse, each get their own answer.
func TestQMPConcurrent(t *testing.T) {
	const n = 8
	c := dial(t, nil, func(f *fakeQEMU) {
		var names []string
		var ids []uint64
		for range n {
			name, id := f.next()
			names, ids = append(names, name), append(ids, id)
		}
		for i := n - 1; i >= 0; i-- {
			f.send(`{"return": {"name": %q}, "id": %d}`, names[i], ids[i])
		}
	})
	var wg sync.WaitGroup
	for i := range n {
		wg.Add(1)
		go func() {
			defer wg.Done()
			var r struct{ Name string }
			name := fmt.Sprintf("command-%d", i)
			if err := c.Execute(t.Context(), name, map[string]int{"a": 1}, &r); err != nil || r.Name != name {
				t.Errorf("%s: %q, %v", name, r.Name, err)
			}
		}()
	}
	wg.Wait()
}

func TestQMPError(t *testing.T) {
	c := dial(t, nil, func(f *fakeQEMU) {
		_, id := f.next()
		f.send(`{"error": {"class": "CommandNotFound", "desc": "no such thing"}, "id": %d}`, id)
	})
	err := c.Execute(t.Context(), "nonsense", nil, nil)
	var ce *CommandError
	if !errors.As(err, &ce) || ce.Class != "CommandNotFound" || ce.Desc != "no such thing" || ce.Command != "nonsense" {
		t.Fatal(err)
	}
}

func TestQMPEvents(t *testing.T) {
	got := make(chan Event, 2)
	dial(t, func(e Event) { got <- e }, func(f *fakeQEMU) {
		f.send(`{"timestamp": {"seconds": 7, "microseconds": 5}, "event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}`)
		f.send(`{"timestamp": {"seconds": 8, "microseconds": 0}, "event": "STOP"}`)
	})
	e := <-got
	if e.Name != "SHUTDOWN" || !strings.Contains(string(e.Data), "guest-reset") || !e.Time.Equal(time.Unix(7, 5000)) {
		t.Errorf("%+v", e)
	}
	if e = <-got; e.Name != "STOP" || e.Data != nil {
		t.Errorf("%+v", e)
	}
}

// A peer that hangs up fails what waits; so does a context.
func TestQMPEnds(t *testing.T) {
	c := dial(t, nil, func(f *fakeQEMU) {
		f.next()
		_ = f.conn.Close()
	})
	if err := c.Execute(t.Context(), "quit", nil, nil); !errors.Is(err, ErrQMPClosed) {
		t.Error(err)
	}
	<-c.Done()
	if !errors.Is(c.Err(), ErrQMPClosed) {
		t.Error(c.Err())
	}
	if err := c.Execute(t.Context(), "quit", nil, nil); !errors.Is(err, ErrQMPClosed) {
		t.Error(err)
	}

	got, release := make(chan struct{}), make(chan struct{})
	c = dial(t, nil, func(f *fakeQEMU) {
		_, id := f.next()
		close(got)
		<-release
		f.send(`{"return": {}, "id": %d}`, id) // late: nobody waits, no harm
		_, id = f.next()
		f.send(`{"return": {}, "id": %d}`, id)
	})
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-got; cancel() }()
	if err := c.Execute(ctx, "slow", nil, nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	close(release)
	if err := c.Execute(t.Context(), "next", nil, nil); err != nil {
		t.Error(err)
	}
}

// What no QEMU says ends the connection, with the reason.
func TestQMPHostile(t *testing.T) {
	for name, line := range map[string]string{
		"no JSON":         `{"return": `,
		"unknown id":      `{"return": {}, "id": 99}`,
		"no id":           `{"return": {}}`,
		"parse error":     `{"error": {"class": "GenericError", "desc": "JSON parse error"}}`,
		"two kinds":       `{"return": {}, "event": "STOP", "id": 2}`,
		"nothing":         `{}`,
		"an id of text":   `{"return": {}, "id": "x"}`,
		"second greeting": strings.TrimSpace(greeting),
		"too long":        `{"return": "` + strings.Repeat("x", MaxMessage) + `"}`,
		"deep":            strings.Repeat(`[`, 100000),
	} {
		t.Run(name, func(t *testing.T) {
			c := dial(t, nil, func(f *fakeQEMU) {
				f.next()
				f.send("%s", line)
			})
			if err := c.Execute(t.Context(), "query-status", nil, nil); !errors.Is(err, ErrQMP) {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestQMPNoGreeting(t *testing.T) {
	f, conn := newFake(t)
	go func() { f.send(`{"event": "STOP"}`) }()
	if _, err := NewClient(t.Context(), conn, nil); !errors.Is(err, ErrQMP) {
		t.Error(err)
	}
	_, conn = newFake(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := NewClient(ctx, conn, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}

// A peer that answers nothing holds a bounded number of commands.
func TestQMPPending(t *testing.T) {
	c := dial(t, nil, func(f *fakeQEMU) {
		for {
			if name, _ := f.next(); name == "" {
				return
			}
		}
	})
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	for range maxPending {
		if err := c.Execute(gone, "x", nil, nil); !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
	}
	if err := c.Execute(t.Context(), "x", nil, nil); err == nil || !strings.Contains(err.Error(), "unanswered") {
		t.Error(err)
	}
}

// A stream reads from data and swallows writes.
type stream struct{ io.Reader }

func (stream) Write(p []byte) (int, error) { return len(p), nil }
func (stream) Close() error                { return nil }

func FuzzQMP(f *testing.F) {
	f.Add([]byte(greeting + `{"return": {}, "id": 1}` + "\n" + `{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}` + "\n"))
	f.Add([]byte(greeting + `{"error": {"class": "a", "desc": "b"}, "id": 1}` + "\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := NewClient(t.Context(), stream{strings.NewReader(string(data))}, nil)
		if err != nil {
			return
		}
		_ = c.Execute(t.Context(), "x", nil, nil)
		<-c.Done()
		if c.Err() == nil {
			t.Error("ended without a reason")
		}
		_ = c.Close()
	})
}
