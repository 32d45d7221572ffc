package ext4

import (
	"encoding/binary"
	"hash/crc32"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// crc32c goes on with a sum as the kernel does: without the inversions that package crc32 begins and ends with.
func crc32c(sum uint32, p []byte) uint32 { return ^crc32.Update(^sum, castagnoli, p) }

// crc32cLE goes on with a number, as it lies on disk.
func crc32cLE(sum, v uint32) uint32 {
	var b [4]byte
	binary.LittleEndian.PutUint32(b[:], v)
	return crc32c(sum, b[:])
}

var zeros [4]byte

// crc16 goes on with the sum of "Block Group Descriptors" without metadata_csum (polynomial 0x8005, reflected).
func crc16(sum uint16, p []byte) uint16 {
	for _, c := range p {
		sum = sum>>8 ^ crc16Table[byte(sum)^c]
	}
	return sum
}

var crc16Table = func() (t [256]uint16) {
	for i := range t {
		v := uint16(i)
		for range 8 {
			v = v>>1 ^ 0xa001*(v&1)
		}
		t[i] = v
	}
	return t
}()

// crc32be goes on with the sum of a journal's first checksum version (polynomial 0x04c11db7, not reflected).
func crc32be(sum uint32, p []byte) uint32 {
	for _, c := range p {
		sum = sum<<8 ^ crc32beTable[byte(sum>>24)^c]
	}
	return sum
}

var crc32beTable = func() (t [256]uint32) {
	for i := range t {
		v := uint32(i) << 24
		for range 8 {
			v = v<<1 ^ 0x04c11db7*(v>>31)
		}
		t[i] = v
	}
	return t
}()
