package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
)

// sink writes what comes over each connection to the beginning of a disk: 8 bytes with a length (little
// endian), then so many bytes. When all are on the disk, flushed, it answers with the length.
func sink(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", ":7001")
	if err != nil {
		return err
	}
	fmt.Println("READY")
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		err = take(c, f, size)
		_ = c.Close()
		if err != nil {
			return fmt.Errorf("DISK-ERROR %w", err)
		}
	}
}

func take(c net.Conn, f *os.File, size int64) error {
	var head [8]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return err
	}
	n := int64(binary.LittleEndian.Uint64(head[:]))
	if n < 0 || n > size {
		return fmt.Errorf("%d bytes for a disk of %d", n, size)
	}
	buf := make([]byte, 256<<10)
	for at := int64(0); at < n; {
		k, err := io.ReadFull(c, buf[:min(int64(len(buf)), n-at)])
		if err != nil {
			return err
		}
		if _, err := f.WriteAt(buf[:k], at); err != nil {
			return err
		}
		at += int64(k)
	}
	if err := f.Sync(); err != nil {
		return err
	}
	_, err := c.Write(head[:])
	return err
}
