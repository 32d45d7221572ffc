package pciback

import (
	"context"
	"errors"
	"log/slog"
	"reflect"
	"testing"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/pci/topology"
	"redoubt.dev/redoubt/services/protocol"
)

// ask starts a PCIBack, makes one call and waits for its end.
func ask(t *testing.T, method string, in any) (topology.Topology, error) {
	t.Helper()
	ours, its, err := ipc.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	peer := rpc.New(ours, nil)
	left, heard := make(chan error, 1), make(chan error, 1)
	go func() { left <- Serve(context.Background(), slog.Default(), its) }()
	go func() { heard <- peer.Run(context.Background()) }()
	var out topology.Topology
	_, err = peer.Call(context.Background(), method, in, &out)
	if l := <-left; l != nil { // by itself
		t.Errorf("PCIBack: %v", l)
	}
	if _, again := peer.Call(context.Background(), method, in, nil); !errors.Is(again, rpc.ErrGone) {
		t.Errorf("a second call: %v", again)
	}
	if h := <-heard; h != nil {
		t.Error(h)
	}
	return out, err
}

// PCIBack answers once, a good call or a bad one, and leaves.
func TestAnswersOnceAndLeaves(t *testing.T) {
	r := topology.Guest(topology.Native, 2, 1, true)
	want, err := topology.Assign(r)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := ask(t, protocol.MethodAssign, r); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	for _, bad := range []any{1, "x", map[string]any{"machine": "native", "devices": []any{map[string]any{"kind": "disk", "count": 1 << 40}}}} {
		if _, err := ask(t, protocol.MethodAssign, bad); rpc.KindOf(err) != rpc.Invalid {
			t.Errorf("%v: %v", bad, err)
		}
	}
	if _, err := ask(t, protocol.MethodStart, r); rpc.KindOf(err) != rpc.Refused {
		t.Errorf("another call: %v", err)
	}
}

// It ends with the Builder, asked or not.
func TestEndsWithBuilder(t *testing.T) {
	ours, its, err := ipc.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	left := make(chan error, 1)
	go func() { left <- Serve(context.Background(), slog.Default(), its) }()
	ours.Close()
	if err := <-left; err != nil {
		t.Error(err)
	}
}
