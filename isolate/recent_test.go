package isolate

import (
	"maps"
	"testing"
)

// TestRecent: functions are found by their address, whatever else has their place, and each is counted once.
func TestRecent(t *testing.T) {
	var r recent
	names := map[uint64]string{0: "zero", 0x1000: "a", 0x1000 + 64*16: "b", 0x1001: "c", 0x2040: "d"}
	for at, name := range names {
		if r.get(at) != nil {
			t.Errorf("%#x is there", at)
		}
		r.put(at, &counted{name: name})
	}
	want := map[string]uint64{}
	for round := range 3 {
		for at, name := range names {
			f := r.get(at)
			if f == nil || f.name != name {
				t.Fatalf("%#x is %+v, not %s", at, f, name)
			}
			f.times += uint64(round + 1)
			want[name] += uint64(round + 1)
		}
	}
	got := map[string]uint64{"a": 1}
	want["a"]++
	for range 2 { // what was told is not told again
		if r.told(got); !maps.Equal(got, want) {
			t.Errorf("told %v, want %v", got, want)
		}
	}
	r = recent{}
	if r.get(0x1000) != nil {
		t.Error("it is there yet")
	}
}

// TestPlain: what writes for a module, or gives or takes memory, is judged at each call.
func TestPlain(t *testing.T) {
	for name, want := range map[string]bool{
		"memcpy": false, "kfree": false, "__kmalloc_noprof": false, "free_percpu_noprof": false, "dma_map_page_attrs": false, "virtqueue_add_sgs": false, "printk": true,
	} {
		if plain(name) != want {
			t.Errorf("%s: %v", name, plain(name))
		}
	}
}
