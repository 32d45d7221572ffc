package builder

import (
	"strings"
	"testing"

	"redoubt.dev/redoubt/ipc/rpc"
)

// TestAskedOfNoGuest: who asks about the modules of a guest that is down, or is being started, is told that.
func TestAskedOfNoGuest(t *testing.T) {
	b := &Builder{guests: map[string]*guest{"starting": {}}}
	for uuid, want := range map[string]string{"down": "is down", "starting": "is being started"} {
		if _, _, err := b.running(uuid); rpc.KindOf(err) != rpc.Unavailable || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", uuid, err)
		}
	}
}
