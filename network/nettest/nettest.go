// Package nettest is what tests of guests' networks share.
package nettest

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/network"
)

// Namespace is an empty network namespace, gone with the test. The test is skipped where the user is
// not root, and fails where root cannot have one.
func Namespace(t testing.TB) *network.Namespace {
	t.Helper()
	ns, err := network.NewNamespace()
	if errors.Is(err, unix.EPERM) {
		t.Skipf("needs root, as `make test` is run by: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := ns.Close(); err != nil {
			t.Error(err)
		}
	})
	return ns
}
