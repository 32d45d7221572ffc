package main

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A workload is direct I/O on a whole disk, without end.
type workload struct {
	random  bool
	write   bool
	size    int64 // of a request
	streams int   // requests under way at once
	verify  bool  // read back and compare what was written
}

var workloads = map[string]workload{
	"randread":  {random: true, size: 4 << 10, streams: 4},
	"randwrite": {random: true, write: true, size: 4 << 10, streams: 4},
	"seqread":   {size: 256 << 10, streams: 2},
	"seqwrite":  {write: true, size: 256 << 10, streams: 2},
	// One request at a time: its longest is how long the disk was away.
	"single":   {random: true, write: true, size: 4 << 10, streams: 1},
	"verified": {random: true, write: true, verify: true, size: 4 << 10, streams: 1},
}

// load runs a workload and prints each second how much was done and what the longest request took:
// IO second bytes microseconds.
func load(name, path string) error {
	w, ok := workloads[name]
	if !ok {
		return fmt.Errorf("there is no workload %q", name)
	}
	flags := unix.O_RDONLY
	if w.write {
		flags = unix.O_RDWR
	}
	f, err := os.OpenFile(path, flags|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	end, err := f.Seek(0, 2)
	if err != nil {
		return err
	}
	places := end / w.size
	var done, longest, next atomic.Int64
	var failed sync.Once
	errs := make(chan error, 1)
	for range w.streams {
		go func() { // ends with the guest
			buf, back := aligned(int(w.size)), aligned(int(w.size))
			for n := uint64(1); ; n++ {
				at := next.Add(1)
				if w.random {
					at = rand.Int64N(places)
				}
				if w.verify {
					pattern(buf, n, uint64(at))
				}
				begin := time.Now()
				var err error
				if w.write {
					_, err = f.WriteAt(buf, at%places*w.size)
				} else {
					_, err = f.ReadAt(buf, at%places*w.size)
				}
				if w.verify && err == nil {
					if _, err = f.ReadAt(back, at%places*w.size); err == nil && !bytes.Equal(buf, back) {
						err = fmt.Errorf("block %d is not what was written", at)
					}
				}
				if err != nil {
					failed.Do(func() { errs <- err })
					return
				}
				done.Add(w.size)
				for took := time.Since(begin).Microseconds(); ; {
					was := longest.Load()
					if took <= was || longest.CompareAndSwap(was, took) {
						break
					}
				}
			}
		}()
	}
	tick := time.NewTicker(time.Second)
	for second := 0; ; second++ {
		select {
		case err := <-errs:
			return fmt.Errorf("DISK-ERROR %w", err)
		case <-tick.C:
			fmt.Println("IO", second, done.Swap(0), longest.Swap(0))
		}
	}
}

// aligned is a buffer that direct I/O takes.
func aligned(n int) []byte {
	b := make([]byte, n+4096)
	skip := -uintptr(unsafe.Pointer(&b[0])) & 4095 //nolint:gosec // for its alignment only
	return b[skip : skip+uintptr(n)]
}
