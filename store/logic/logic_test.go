package logic

import (
	"bytes"
	"errors"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/store/tree"
	"redoubt.dev/redoubt/store/wire"
)

// TestDecide: what requests mean, and that what is malformed is refused.
func TestDecide(t *testing.T) {
	no := func(e tree.Errno) Action { return Action{Errno: e} }
	for _, c := range []struct {
		t       wire.Type
		payload string
		want    Action
	}{
		{wire.Read, "/a\x00", Action{Path: "/a"}},
		{wire.Read, "a/b\x00", Action{Path: "/local/domain/16/a/b", Relative: true}},
		{wire.Read, "/a", no(tree.EINVAL)},
		{wire.Read, "/a\x00\x00", no(tree.EINVAL)},
		{wire.Read, "\x00", no(tree.EINVAL)},
		{wire.Read, "", no(tree.EINVAL)},
		{wire.Read, "/a/\x00", no(tree.EINVAL)},
		{wire.Read, "../a\x00", no(tree.EINVAL)},
		{wire.Read, "@releaseDomain\x00", Action{Path: "/local/domain/16/@releaseDomain", Relative: true}},
		{wire.Read, strings.Repeat("a", 2049) + "\x00", no(tree.EINVAL)},
		{wire.Read, "/" + strings.Repeat("a", 3071) + "\x00", Action{Path: "/" + strings.Repeat("a", 3071)}},
		{wire.Read, "/" + strings.Repeat("a", 3072) + "\x00", no(tree.EINVAL)},
		{wire.Write, "/a\x00v\x00\x00w", Action{Path: "/a", Value: []byte("v\x00\x00w")}},
		{wire.Write, "/a\x00", Action{Path: "/a", Value: []byte{}}},
		{wire.Write, "/a", no(tree.EINVAL)},
		{wire.DirectoryPart, "/a\x0017\x00", Action{Path: "/a", Offset: 17}},
		{wire.DirectoryPart, "/a\x0017", Action{Path: "/a", Offset: 17}},
		{wire.DirectoryPart, "/a\x00-1\x00", no(tree.EINVAL)},
		{wire.DirectoryPart, "/a\x00", no(tree.EINVAL)},
		{wire.SetPerms, "/a\x00b1\x00r2\x00", Action{Path: "/a", Perms: []tree.Perm{{Domain: 1, Access: tree.Both}, {Domain: 2, Access: tree.Read}}}},
		{wire.SetPerms, "@releaseDomain\x00n0\x00", Action{Path: "@releaseDomain", Perms: []tree.Perm{{}}}},
		{wire.SetPerms, "/a\x00", no(tree.EINVAL)},
		{wire.SetPerms, "/a\x00x1\x00", no(tree.EINVAL)},
		{wire.SetPerms, "/a\x00r1", no(tree.EINVAL)},
		{wire.Watch, "/a\x00tok\x00", Action{Path: "/a", Token: "tok"}},
		{wire.Watch, "/a\x00tok\x00reserved\x00", Action{Path: "/a", Token: "tok"}},
		{wire.Watch, "@introduceDomain\x00t\x00", Action{Path: "@introduceDomain", Token: "t"}},
		{wire.Watch, "/a\x00", no(tree.EINVAL)},
		{wire.TransactionStart, "\x00", Action{}},
		{wire.TransactionStart, "x\x00", no(tree.EINVAL)},
		{wire.TransactionEnd, "T\x00", Action{Commit: true}},
		{wire.TransactionEnd, "F\x00", Action{}},
		{wire.TransactionEnd, "T", no(tree.EINVAL)},
		{wire.TransactionEnd, "X\x00", no(tree.EINVAL)},
		{wire.Introduce, "7\x00123\x004\x00", Action{Domain: 7}},
		{wire.Introduce, "7\x00", no(tree.EINVAL)},
		{wire.Release, "65536\x00", no(tree.EINVAL)},
		{wire.GetDomainPath, "seven\x00", no(tree.EINVAL)},
		{wire.SetTarget, "7\x008\x00", Action{Domain: 7, Target: 8}},
		{wire.Control, "quota\x001\x00", Action{Words: []string{"quota", "1"}}},
		{wire.WatchEvent, "\x00", no(tree.ENOSYS)},
		{20, "\x00", no(tree.ENOSYS)},
		{1 << 31, "", no(tree.ENOSYS)},
	} {
		r := Request{Domain: 16, Type: c.t, Payload: []byte(c.payload)}
		if got := Decide(r); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%v %.40q: %+v, want %+v", c.t, c.payload, got, c.want)
		} else if err := got.Check(c.t, 16); err != nil {
			t.Errorf("%v %.40q: %v", c.t, c.payload, err)
		}
	}
	if s := (Action{Path: "/local/domain/16/x", Relative: true}).Shown(16); s != "x" {
		t.Error(s)
	}
}

// TestServe: a worker answers until its other end closes, and gives up on what is no request.
func TestServe(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- Serve(fds[1]) }()
	buf := make([]byte, MaxMessage)
	for seq := range uint64(3) {
		if _, err := unix.Write(fds[0], AppendRequest(nil, seq, Request{Domain: 1, Type: wire.Read, Payload: wire.Join("x")})); err != nil {
			t.Fatal(err)
		}
		n, err := unix.Read(fds[0], buf)
		if err != nil {
			t.Fatal(err)
		}
		got, a, err := ParseAnswer(buf[:n])
		if got != seq || err != nil || a.Path != "/local/domain/1/x" {
			t.Fatalf("%d %+v %v", got, a, err)
		}
	}
	if _, err := unix.Write(fds[0], []byte("short")); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, wire.ErrMessage) {
		t.Fatal(err)
	}
	go func() { done <- Serve(fds[1]) }()
	unix.Close(fds[0])
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	unix.Close(fds[1])
}

// FuzzDecide: whatever a client writes, its meaning passes the check, survives the way to State,
// and is one of the type that the header named.
func FuzzDecide(f *testing.F) {
	for _, p := range []string{"/a\x00v", "a/b\x00", "@releaseDomain\x00t\x00", "/a\x00b1\x00r2\x00", "T\x00", "7\x0012\x003\x00", "/a\x0012\x00", ""} {
		for _, ty := range []uint32{0, 2, 4, 7, 8, 11, 14, 19, 22} {
			f.Add(ty, uint32(16), []byte(p))
		}
	}
	f.Fuzz(func(t *testing.T, ty, d uint32, payload []byte) {
		if len(payload) > wire.MaxPayload {
			return
		}
		r := Request{Domain: tree.Domain(d), Type: wire.Type(ty), Payload: payload}
		seq, again, err := ParseRequest(AppendRequest(nil, 9, r))
		if err != nil || seq != 9 || again.Type != r.Type || again.Domain != r.Domain || !bytes.Equal(again.Payload, payload) {
			t.Fatalf("request came over as %+v %v", again, err)
		}
		a := Decide(r)
		if err := a.Check(r.Type, r.Domain); err != nil {
			t.Fatalf("%+v: %v", a, err)
		}
		b := AppendAnswer(nil, 7, a)
		seq, got, err := ParseAnswer(b)
		if err != nil || seq != 7 || len(b) > MaxMessage || !bytes.Equal(AppendAnswer(nil, 7, got), b) {
			t.Fatalf("%+v came over as %+v (%v)", a, got, err)
		}
	})
}

// FuzzParseAnswer: whatever a worker answers is an error or means one thing only, and the check
// does not fail otherwise than by an error.
func FuzzParseAnswer(f *testing.F) {
	f.Add(AppendAnswer(nil, 1, Action{Path: "/a", Value: []byte("v"), Perms: []tree.Perm{{Domain: 1, Access: tree.Both}}, Words: []string{"x"}}))
	f.Add(AppendAnswer(nil, 1, Action{Errno: tree.EINVAL}))
	f.Add(AppendAnswer(nil, 1, Action{Path: "/local/domain/16/a", Relative: true, Token: "t"})[:30])
	f.Add(bytes.Repeat([]byte{0xff}, 64))
	f.Fuzz(func(t *testing.T, b []byte) {
		seq, a, err := ParseAnswer(b)
		if err != nil {
			if !errors.Is(err, ErrAnswer) {
				t.Fatal(err)
			}
			return
		}
		if !bytes.Equal(AppendAnswer(nil, seq, a), b) {
			t.Fatalf("%x reads as %+v", b, a)
		}
		for ty := range wire.Type(24) {
			if err := a.Check(ty, 16); err != nil && !errors.Is(err, ErrAnswer) {
				t.Fatal(err)
			}
		}
	})
}
