package block

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"testing"
)

// cut makes buffers of random lengths, many more than one call takes, out of b.
func cut(r *rand.Rand, b []byte, most int) [][]byte {
	var p [][]byte
	for len(b) > 0 {
		n := min(len(b), r.IntN(most))
		p = append(p, b[:n:n])
		b = b[n:]
	}
	return p
}

// Buffers of any number and length are moved as one range would be.
func TestVector(t *testing.T) {
	r := open(t, create(t), false)
	random := rand.New(rand.NewPCG(1, 2))
	model := make([]byte, size)
	for range 200 {
		off := random.Int64N(size)
		n := random.Int64N(min(size-off, 64<<10) + 1)
		data := make([]byte, n)
		for i := range data {
			data[i] = byte(random.Uint32())
		}
		if err := r.WriteVector(cut(random, data, 50), off); err != nil {
			t.Fatal(err)
		}
		copy(model[off:], data)

		off = random.Int64N(size)
		got := make([]byte, random.Int64N(min(size-off, 64<<10)+1))
		if err := r.ReadVector(cut(random, got, 50), off); err != nil || !bytes.Equal(got, model[off:off+int64(len(got))]) {
			t.Fatalf("%d bytes at %d: wrong, or %v", len(got), off, err)
		}
		clear(got)
		if p := cut(random, got, 200); r.ReadCached(p, off) && !bytes.Equal(got, model[off:off+int64(len(got))]) {
			t.Fatalf("%d cached bytes at %d are wrong", len(got), off)
		}
	}
}

func TestVectorRefused(t *testing.T) {
	path := create(t)
	r := open(t, path, false)
	p := [][]byte{make([]byte, 512), make([]byte, 512)}
	for _, off := range []int64{-1, size - 512, size, 1 << 62} {
		if err := r.ReadVector(p, off); !errors.Is(err, ErrRange) {
			t.Errorf("read at %d: %v", off, err)
		}
		if err := r.WriteVector(p, off); !errors.Is(err, ErrRange) {
			t.Errorf("write at %d: %v", off, err)
		}
		if r.ReadCached(p, off) {
			t.Errorf("cached read at %d", off)
		}
	}
	if err := os.Truncate(path, size-512); err != nil { // behind its back
		t.Fatal(err)
	}
	if err := r.ReadVector(p, size-1024); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("read beyond a cut: %v", err)
	}
	if r.ReadCached(p, size-1024) {
		t.Error("cached read beyond a cut")
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	only := open(t, create(t), true)
	if err := only.WriteVector(p, 0); !errors.Is(err, ErrReadOnly) {
		t.Errorf("write to a read-only image: %v", err)
	}
}
