package cli

import (
	"errors"
	"strings"
	"testing"

	"connectrpc.com/connect"
)

// TestExplain: a call over which a toolstack ended is told as that, in whatever words the end reached it.
func TestExplain(t *testing.T) {
	a := &app{runDir: t.TempDir()}
	for err, want := range map[error]string{
		connect.NewWireError(connect.CodeCanceled, errors.New("context canceled")):         "were replaced over this",
		connect.NewWireError(connect.CodeAborted, errors.New("the Builder is replaced")):   "were replaced over this",
		connect.NewError(connect.CodeUnavailable, errors.New("unexpected EOF")):            "were replaced over this",
		connect.NewWireError(connect.CodeNotFound, errors.New(`guest "x": no such guest`)): `guest "x": no such guest`,
		errors.New("local"): "local",
	} {
		if got := a.explain(err); !strings.Contains(got, want) {
			t.Errorf("%v: %q", err, got)
		}
	}
}
