package modules

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"testing"

	"redoubt.dev/redoubt/introspect/introspecttest"
	"redoubt.dev/redoubt/introspect/types"
)

// TestList: the modules of a real guest are those that it lists itself, at their places; a list that it damages costs
// its own answer.
func TestList(t *testing.T) {
	g := introspecttest.Boot(t, "cat /proc/modules", "dummy", "virtio_blk")
	k := g.Find(t)
	all, err := types.Find(g.Image)
	if err != nil {
		t.Fatal(err)
	}
	list, err := List(k, all)
	if err != nil {
		t.Fatal(err)
	}
	var got, want []string
	for _, m := range list {
		got = append(got, fmt.Sprintf("%s %#016x", m.Name, m.Text))
		if p, err := k.Space.Walk(m.Text); err != nil || !p.Executable || m.Size == 0 {
			t.Errorf("%+v: its code is at %+v, %v", m, p, err)
		}
	}
	for _, l := range g.Said { // name, size, users, who they are, state, address
		f := strings.Fields(l)
		want = append(want, f[0]+" "+f[5])
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") || len(got) < 2 {
		t.Errorf("found\n%s\nthe guest says\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}

	// The guest's memory is changed as the guest could.
	l, err := layoutOf(all)
	if err != nil {
		t.Fatal(err)
	}
	first := list[0].Address + l.list.Offset
	page, err := k.Space.Walk(first)
	if err != nil {
		t.Fatal(err)
	}
	at := int64(page.Physical + first - page.Virtual)
	var was [pointer]byte
	if _, err := g.Memory.ReadAt(was[:], at); err != nil {
		t.Fatal(err)
	}
	for name, to := range map[string]uint64{
		"to itself": first, "to nothing": 0, "beyond the addresses": 1 << 60, "to what is not mapped": 1<<64 - 1<<46,
	} {
		if _, err := g.Memory.WriteAt(binary.LittleEndian.AppendUint64(nil, to), at); err != nil {
			t.Fatal(err)
		}
		if list, err := List(k, all); !errors.Is(err, ErrList) || len(list) > Most {
			t.Errorf("%s: %d modules, %v", name, len(list), err)
		}
	}
	if _, err := g.Memory.WriteAt(was[:], at); err != nil {
		t.Fatal(err)
	}
}
