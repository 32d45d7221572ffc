package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// A datagram of talk's: talkHead bytes, then what only this number has.
const (
	talkHead = 16 // number of the boot, 0 in a question; number of the datagram; both little endian
	talkMost = 1400
	talkPort = ":7002"
)

// talk answers each datagram with itself and a number that only this boot has. One that is not what
// its own number says ends it.
func talk() error {
	// What comes while this process does not run must not be lost for want of room.
	room := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		if cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20) }); cerr != nil {
			return cerr
		}
		return err
	}}
	c, err := room.ListenPacket(context.Background(), "udp4", talkPort)
	if err != nil {
		return err
	}
	var boot [8]byte
	for bytes.Equal(boot[:], make([]byte, 8)) {
		if _, err := rand.Read(boot[:]); err != nil {
			return err
		}
	}
	buf, want := make([]byte, 2048), make([]byte, 2048)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return err
		}
		if n < talkHead {
			return fmt.Errorf("NET-ERROR datagram of %d bytes", n)
		}
		w := datagram(want, binary.LittleEndian.Uint64(buf[8:]))
		if !bytes.Equal(buf[:n], w) {
			return fmt.Errorf("NET-ERROR datagram %d of %d bytes, want %d: %x", binary.LittleEndian.Uint64(buf[8:]), n, len(w), buf[:min(n, 64)])
		}
		copy(buf, boot[:])
		if _, err := c.WriteTo(buf[:n], from); err != nil {
			return fmt.Errorf("NET-ERROR %w", err)
		}
	}
}

// datagram is the question of a number; its length is the number's, too.
func datagram(buf []byte, number uint64) []byte {
	words := 1 + number*7919%((talkMost-talkHead)/8)
	buf = buf[:talkHead+8*words]
	clear(buf[:8])
	binary.LittleEndian.PutUint64(buf[8:], number)
	pattern(buf[talkHead:], number+1, 0)
	return buf
}
