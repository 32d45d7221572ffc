package network

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"
	"time"

	"redoubt.dev/redoubt/virtio"
)

// Of a frame of a TCP segment that is to be cut by whoever must.
const (
	cutSize     = 1400 // bytes of payload of each piece
	tcpHeaders  = 14 + 20 + 20
	wholeLength = 40_000 // of the payload
)

// segment is such a frame behind its header (virtio 1.2 §5.1.6): the guest of macA says it to macB.
func segment(from netip.Addr) []byte {
	le := binary.LittleEndian
	b := []byte{1, 1} // the checksum is to be completed; TCP over IPv4
	for _, v := range [...]uint16{tcpHeaders, cutSize, 14 + 20, 16, 0} {
		b = le.AppendUint16(b, v)
	}
	tcp := make([]byte, 20+wholeLength)
	binary.BigEndian.PutUint16(tcp[0:], 1000)
	binary.BigEndian.PutUint16(tcp[2:], 2000)
	tcp[12], tcp[13] = 5<<4, 0x10 // 20 bytes of header, ACK
	for i := range wholeLength {
		tcp[20+i] = byte(i*7 + i>>8)
	}
	frame := ip4(macB, macA, from, ipB, 6, tcp)
	binary.BigEndian.PutUint16(frame[16:], 20+uint16(len(tcp)))
	binary.BigEndian.PutUint16(frame[24:], 0)
	binary.BigEndian.PutUint16(frame[24:], ^checksum(frame[14:34]))
	// The checksum of the pseudo header, not complemented, is where the device completes it.
	binary.BigEndian.PutUint16(frame[50:], checksum(frame[26:34], []byte{0, 6}, binary.BigEndian.AppendUint16(nil, uint16(len(tcp)))))
	return append(b, frame...)
}

// TestSegments: a TCP segment that nobody has cut passes the filter as its pieces would, or does not; it
// reaches a guest whose driver takes it as a whole, any other in pieces with whole checksums.
func TestSegments(t *testing.T) { bothKinds(t, segments) }

func segments(t *testing.T, filtering bool) {
	const csum, tso = virtio.NetFeatureGuestCsum, virtio.NetFeatureGuestTSO4 | virtio.NetFeatureGuestTSO6 | virtio.NetFeatureGuestECN
	n := newTestNet(t)
	marker := arp(everybody, macA, macA, ipA, ipA)
	for _, c := range []struct {
		name     string
		off      bool // the filter
		features uint64
		whole    bool
	}{
		{"whole", false, csum | tso | virtio.NetFeatureMergeable, true},
		{"pieces", false, 0, false},
		{"pieces with partial checksums", false, csum, false},
		{"a driver that breaks the features' dependences", false, tso, false},
		{"the next of one that does not", false, csum | tso, true},
		{"without the filter", true, csum | tso, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := NIC{ID: 1, VLAN: 5, MAC: macA, Addresses: []netip.Addr{ipA}, Unfiltered: c.off}
			n.apply(Config{NICs: []NIC{a, {ID: 2, VLAN: 5, MAC: macB}}}, filtering)
			if err := n.taps[2].Configure(c.features, testHeader); err != nil {
				t.Fatal(err)
			}
			for _, from := range []netip.Addr{ipA, ipB} {
				if _, err := n.taps[1].File.Write(segment(from)); err != nil {
					t.Fatal(err)
				}
				n.send(1, marker)
				heard := n.payload(2, marker, c.whole, c.features&csum != 0)
				switch want := segment(from)[testHeader+tcpHeaders:]; {
				case from != ipA && !c.off:
					if len(heard) != 0 {
						t.Errorf("%d bytes from another's address", len(heard))
					}
				case !bytes.Equal(heard, want):
					t.Errorf("%d bytes arrived, want %d", len(heard), len(want))
				}
			}
		})
	}
}

// payload reads TCP's payload up to a marker, and holds each frame against what the driver takes.
func (n *testNet) payload(id int, marker []byte, whole, partial bool) (all []byte) {
	n.t.Helper()
	f := n.taps[id].File
	if err := f.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		n.t.Fatal(err)
	}
	buf := make([]byte, 1<<17)
	for {
		k, err := f.Read(buf)
		if err != nil {
			n.t.Fatal(err)
		}
		header, frame := buf[:testHeader], buf[testHeader:k]
		if bytes.Equal(frame, marker) {
			return all
		}
		switch {
		case whole != (len(frame) > tcpHeaders+cutSize), whole != (header[1] == 1), !partial && header[0]&1 != 0:
			n.t.Fatalf("a frame of %d bytes came with the header % x", len(frame), header)
		case !partial && checksum(frame[26:34], []byte{0, 6}, binary.BigEndian.AppendUint16(nil, uint16(len(frame)-34)), frame[34:]) != 0xffff:
			n.t.Fatalf("a frame of %d bytes came without its checksum", len(frame))
		}
		all = append(all, frame[tcpHeaders:]...)
	}
}

// checksum is the sum of RFC 1071, not complemented; all parts but the last are of even length.
func checksum(parts ...[]byte) uint16 {
	sum := uint32(0)
	for _, p := range parts {
		for a := range slices.Chunk(p, 2) {
			sum += uint32(a[0]) << 8
			if len(a) > 1 {
				sum += uint32(a[1])
			}
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}
