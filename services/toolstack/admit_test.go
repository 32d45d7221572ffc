package toolstack

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	v1 "redoubt.dev/redoubt/api/redoubt/v1"
	"redoubt.dev/redoubt/api/redoubt/v1/redoubtv1connect"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/protocol"
)

// client is one of the API, on one connection.
type client struct {
	redoubtv1connect.GuestServiceClient
	http  *http.Client
	close func()
}

func http2(c net.Conn) client {
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	tr := &http.Transport{Protocols: &p, DialContext: func(context.Context, string, string) (net.Conn, error) { return c, nil }}
	h := &http.Client{Transport: tr}
	return client{redoubtv1connect.NewGuestServiceClient(h, "http://x"), h, func() { tr.CloseIdleConnections(); c.Close() }}
}

// soon is when what should be at once has to be.
const soon = 10 * time.Second

// TestBodyUnread: who may not make a call is answered though nothing, or no end, comes of the body.
func TestBodyUnread(t *testing.T) {
	path, denied := served(t)
	for name, procedure := range map[string]string{
		"Validate": redoubtv1connect.GuestServiceValidateProcedure, "Logs": redoubtv1connect.GuestServiceLogsProcedure,
		"Console": redoubtv1connect.GuestServiceConsoleProcedure,
	} {
		kind := "application/proto"
		if name != "Validate" {
			kind = "application/connect+proto"
		}
		for _, length := range []string{"Content-Length: 100", "Content-Length: 33554432", "Transfer-Encoding: chunked"} {
			c := dialAs(t, stranger, path)
			if err := c.SetDeadline(time.Now().Add(soon)); err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(c, "POST "+procedure+" HTTP/1.1\r\nHost: x\r\nContent-Type: "+kind+"\r\n"+length+"\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			res, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil {
				t.Fatalf("%s, %s: %v", name, length, err)
			}
			b, err := io.ReadAll(res.Body)
			res.Body.Close()
			if err != nil || !strings.Contains(string(b), "has no part in tenant acme") || !strings.Contains(string(b), "permission_denied") {
				t.Errorf("%s, %s: %d: %q, %v", name, length, res.StatusCode, b, err)
			}
			if d := <-denied; d.Method != name || d.Caller.UID != stranger {
				t.Errorf("denied %+v", d)
			}
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
				t.Errorf("%s, %s: the connection goes on: %v", name, length, err)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), soon)
		body, end := io.Pipe()
		r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://x"+procedure, body)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Content-Type", kind)
		res, err := http2(dialAs(t, stranger, path)).http.Do(r)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		b, err := io.ReadAll(res.Body)
		if err != nil || !strings.Contains(string(b), "has no part in tenant acme") {
			t.Errorf("%s: %q, %v", name, b, err)
		}
		res.Body.Close()
		_ = end.Close()
		cancel()
		<-denied
	}
}

// TestRoles: who may make a call makes it.
func TestRoles(t *testing.T) {
	path, denied := served(t)
	for uid, may := range map[int][2]bool{0: {true, true}, stranger + 1: {true, true}, stranger + 2: {true, false}, stranger: {false, false}} {
		c := http2(dialAs(t, uid, path))
		_, list := c.List(t.Context(), &v1.ListRequest{})
		events, follow := c.Events(t.Context(), &v1.EventsRequest{})
		if follow == nil {
			for events.Receive() {
			}
			follow = events.Err()
			_ = events.Close()
		}
		_, stop := c.Stop(t.Context(), &v1.StopRequest{Name: "none"})
		_, validate := c.Validate(t.Context(), &v1.ValidateRequest{Name: "none"})
		for _, did := range []struct {
			err error
			may bool
			as  connect.Code // where it may: there is no such guest
		}{{list, may[0], 0}, {follow, may[0], 0}, {stop, may[1], connect.CodeNotFound}, {validate, may[1], connect.CodeNotFound}} {
			want := did.as
			if !did.may {
				want = connect.CodePermissionDenied
				<-denied
			}
			if (did.err != nil || want != 0) && connect.CodeOf(did.err) != want {
				t.Errorf("user %d: %v, want %v", uid, did.err, want)
			}
		}
		c.close()
	}
	if len(denied) > 0 {
		t.Errorf("denied %+v", <-denied)
	}
}

// TestLarge: large requests are few at a time, who waits for others may give up, and those that are not large keep nobody waiting.
// No other call has one.
func TestLarge(t *testing.T) {
	ts, calls := slow(t)
	web(ts, Running)
	path, _ := serve(t, ts)
	c := http2(dialAs(t, stranger+1, path))
	defer c.close()
	large := &v1.ValidateRequest{Name: "web", Seen: make([]byte, maxRequest+1), SeenAtNs: 1}
	done := make(chan error, 16)
	validate := func(r *v1.ValidateRequest) said {
		go func() { _, err := c.Validate(t.Context(), r); done <- err }()
		return is(t, calls, protocol.MethodValidate)
	}
	failed := rpc.Errorf(rpc.Invalid, "no")
	end := func(s said) {
		s.answer <- failed
		if err := <-done; connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Error(err)
		}
	}
	var under []said
	for range 3 * maxLargeAtOnce {
		under = append(under, validate(&v1.ValidateRequest{Name: "web"}))
	}
	var taken []said
	for range maxLargeAtOnce {
		taken = append(taken, validate(large))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.Validate(ctx, large); connect.CodeOf(err) != connect.CodeDeadlineExceeded {
		t.Errorf("one more: %v", err)
	}
	if _, err := http2(dialAs(t, stranger, path)).Validate(t.Context(), large); connect.CodeOf(err) != connect.CodePermissionDenied {
		t.Errorf("a stranger waits: %v", err)
	}
	if _, err := c.Get(t.Context(), &v1.GetRequest{Name: string(make([]byte, maxRequest+1))}); connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("a large name: %v", err)
	}
	end(taken[0])
	end(validate(large))
	for _, s := range append(under, taken[1:]...) {
		end(s)
	}
}

// TestSending: who does not send a large request keeps others waiting for a while only; what is done with one takes as long as it does.
func TestSending(t *testing.T) {
	const sending = 50 * time.Millisecond
	r := &roles{operators: []uint32{nobody.UID}}
	server := httptest.NewServer(admit(r, sending, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if _, err := io.ReadAll(req.Body); err != nil {
			w.WriteHeader(http.StatusRequestTimeout)
			return
		}
		select {
		case <-time.After(3 * sending):
		case <-req.Context().Done():
			t.Error("the call ends with the time for sending")
		}
	})))
	defer server.Close()
	post := func(body io.Reader) int {
		res, err := http.Post(server.URL+redoubtv1connect.GuestServiceValidateProcedure, "application/proto", body)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		return res.StatusCode
	}
	for range maxLargeAtOnce + 1 {
		body, end := io.Pipe()
		if got := post(body); got != http.StatusRequestTimeout {
			t.Errorf("nothing is sent: %d", got)
		}
		_ = end.Close()
	}
	if got := post(strings.NewReader("all")); got != http.StatusOK {
		t.Errorf("all is sent: %d", got)
	}
}
