package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

const (
	verifyBlock = 4 << 10
	verifyChunk = 16 * verifyBlock // of one request
)

// verify writes a disk full of a pattern, flushes it, reads it back from the disk itself and
// compares, round after round, and prints each; a number of rounds ends it. The first block holds the
// last round that was flushed: one that begins anew holds the disk to it, so that what a reboot
// interrupted may be there or not, but nothing that was flushed may be lost. All the while it
// extends a register of its TPM, see chain.
func verify(path string, rounds int) error {
	direct, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT|unix.O_DSYNC, 0)
	if err != nil {
		return err
	}
	defer direct.Close()
	cached, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer cached.Close()
	end, err := direct.Seek(0, 2)
	if err != nil {
		return err
	}
	blocks := uint64(end / verifyBlock)
	header := aligned(verifyBlock)
	if _, err := direct.ReadAt(header, 0); err != nil {
		return diskError(0, err)
	}
	last := binary.LittleEndian.Uint64(header)
	if err := compare(direct, blocks, last, last+1); err != nil {
		return diskError(last, err)
	}
	tpm, err := startChain()
	if err != nil {
		return err
	}
	fmt.Println("FOUND", last)
	for round := last + 1; rounds == 0 || round <= last+uint64(rounds); round++ {
		// In turns through the page cache, with many requests at once, and past it.
		to := cached
		if round%2 == 0 {
			to = direct
		}
		if err := fill(to, blocks, round); err != nil {
			return diskError(round, err)
		}
		if err := cached.Sync(); err != nil {
			return diskError(round, err)
		}
		if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
			return err
		}
		if err := compare(cached, blocks, round, round); err != nil {
			return diskError(round, err)
		}
		binary.LittleEndian.PutUint64(header, round)
		if _, err := direct.WriteAt(header, 0); err != nil {
			return diskError(round, err)
		}
		if err := tpm.check(); err != nil {
			return err
		}
		fmt.Println("LINKS", tpm.links.Load())
		fmt.Println("ROUND", round)
	}
	return nil
}

func diskError(round uint64, err error) error {
	return fmt.Errorf("DISK-ERROR round %d: %w", round, err)
}

// pattern fills a block with what only this round has in this place; round 0 is an empty disk's.
func pattern(block []byte, round, index uint64) {
	if round == 0 {
		clear(block)
		return
	}
	x := round*0x9e3779b97f4a7c15 ^ index*0xbf58476d1ce4e5b9
	for i := 0; i < len(block); i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(block[i:], x)
	}
}

func fill(f *os.File, blocks, round uint64) error {
	buf := aligned(verifyChunk)
	return chunks(blocks, func(first, n uint64) error {
		b := buf[:n*verifyBlock]
		for i := range n {
			pattern(b[i*verifyBlock:][:verifyBlock], round, first+i)
		}
		_, err := f.WriteAt(b, int64(first*verifyBlock))
		return err
	})
}

// compare holds each block to one of two rounds.
func compare(f *os.File, blocks, one, other uint64) error {
	buf := aligned(verifyChunk)
	want := make([]byte, verifyBlock)
	return chunks(blocks, func(first, n uint64) error {
		if _, err := f.ReadAt(buf[:n*verifyBlock], int64(first*verifyBlock)); err != nil {
			return err
		}
		for i := range n {
			got := buf[i*verifyBlock:][:verifyBlock]
			if pattern(want, one, first+i); bytes.Equal(got, want) {
				continue
			}
			if pattern(want, other, first+i); !bytes.Equal(got, want) {
				return fmt.Errorf("block %d holds %x", first+i, got[:16])
			}
		}
		return nil
	})
}

// chunks goes over all blocks but the first.
func chunks(blocks uint64, do func(first, n uint64) error) error {
	const most = verifyChunk / verifyBlock
	for first := uint64(1); first < blocks; first += most {
		if err := do(first, min(most, blocks-first)); err != nil {
			return err
		}
	}
	return nil
}
