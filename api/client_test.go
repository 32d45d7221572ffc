package api

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"connectrpc.com/connect"

	v1 "redoubt.dev/redoubt/api/redoubt/v1"
	"redoubt.dev/redoubt/api/redoubt/v1/redoubtv1connect"
)

// server answers calls with errors until there are no more of them.
type server struct {
	redoubtv1connect.UnimplementedGuestServiceHandler
	errs   []error
	calls  int
	takes  time.Duration // an answer
	graces []uint32      // of the stops
}

func (s *server) next() error {
	s.calls++
	if len(s.errs) == 0 {
		return nil
	}
	err := s.errs[0]
	s.errs = s.errs[1:]
	return err
}

func (s *server) Stop(_ context.Context, r *v1.StopRequest) (*v1.StopResponse, error) {
	s.graces = append(s.graces, r.GraceMs)
	<-time.After(s.takes)
	return &v1.StopResponse{}, s.next()
}

func (s *server) Run(context.Context, *v1.RunRequest) (*v1.RunResponse, error) {
	return &v1.RunResponse{}, s.next()
}

// TestAgain: a call over which who served it was replaced is made again where that does no harm; any other answer is
// the answer.
func TestAgain(t *testing.T) {
	dir, err := os.MkdirTemp("", "api") // a socket's name is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	socket := filepath.Join(dir, "sock")
	if _, err := Dial(socket).Stop(t.Context(), &v1.StopRequest{}); Replaced(err) || err == nil {
		t.Errorf("nobody is there, and is taken for replaced: %v", err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := &server{}
	mux := http.NewServeMux()
	mux.Handle(redoubtv1connect.NewGuestServiceHandler(s))
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	h := &http.Server{Handler: mux, Protocols: &p}
	go func() { _ = h.Serve(l) }()
	t.Cleanup(func() { _ = h.Close() })
	stop := func() error {
		_, err := Dial(socket).Stop(t.Context(), &v1.StopRequest{})
		return err
	}
	run := func() error {
		_, err := Dial(socket).Run(t.Context(), &v1.RunRequest{})
		return err
	}
	replaced := connect.NewError(connect.CodeAborted, errors.New("replaced"))
	busy := connect.NewError(connect.CodeUnavailable, errors.New("busy"))
	var sick []error
	for range 2 * maxTries {
		sick = append(sick, replaced)
	}
	for name, c := range map[string]struct {
		call  func() error
		errs  []error
		calls int
		want  connect.Code // 0: none
	}{
		"stop":                      {stop, []error{replaced, replaced}, 3, 0},
		"run":                       {run, []error{replaced}, 1, connect.CodeAborted},
		"an answer":                 {stop, []error{busy}, 1, connect.CodeUnavailable},
		"an answer after the death": {stop, []error{replaced, busy}, 2, connect.CodeUnavailable},
		"without end":               {stop, sick, maxTries, connect.CodeAborted},
	} {
		s.errs, s.calls = c.errs, 0
		err := c.call()
		if code := connect.CodeOf(err); (err == nil) != (c.want == 0) || err != nil && code != c.want || s.calls != c.calls {
			t.Errorf("%s: %v after %d calls, want %v after %d", name, err, s.calls, c.want, c.calls)
		}
		if Replaced(err) != (c.want == connect.CodeAborted) {
			t.Errorf("%s: replaced: %v", name, Replaced(err))
		}
	}

	// A stop's grace period goes on while its services are replaced.
	s.errs, s.graces, s.takes = []error{replaced, replaced}, nil, 40*time.Millisecond
	r := &v1.StopRequest{GraceMs: 50}
	_, err = Dial(socket).Stop(t.Context(), r)
	if g := s.graces; err != nil || len(g) != 3 || g[0] != 50 || g[1] > 10 || g[2] != 0 || r.GraceMs != 50 {
		t.Errorf("grace periods %v of %d ms: %v", g, r.GraceMs, err)
	}
}
