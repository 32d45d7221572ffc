package vhostuser

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// ErrProtocol says that the front end broke the protocol: the connection is closed.
var ErrProtocol = errors.New("vhost-user: protocol broken by the front end")

// request is a front end's request (vhost-user specification, "Front-end message types").
type request uint32

const (
	getFeatures         request = 1
	setFeatures         request = 2
	setOwner            request = 3
	resetOwner          request = 4
	setMemTable         request = 5
	setVringNum         request = 8
	setVringAddr        request = 9
	setVringBase        request = 10
	getVringBase        request = 11
	setVringKick        request = 12
	setVringCall        request = 13
	setVringErr         request = 14
	getProtocolFeatures request = 15
	setProtocolFeatures request = 16
	getQueueNum         request = 17
	setVringEnable      request = 18
	getConfig           request = 24
	setConfig           request = 25
	getInflight         request = 31
	setInflight         request = 32
)

var requestNames = map[request]string{
	getFeatures: "GET_FEATURES", setFeatures: "SET_FEATURES", setOwner: "SET_OWNER", resetOwner: "RESET_OWNER",
	setMemTable: "SET_MEM_TABLE", setVringNum: "SET_VRING_NUM", setVringAddr: "SET_VRING_ADDR",
	setVringBase: "SET_VRING_BASE", getVringBase: "GET_VRING_BASE", setVringKick: "SET_VRING_KICK",
	setVringCall: "SET_VRING_CALL", setVringErr: "SET_VRING_ERR", getProtocolFeatures: "GET_PROTOCOL_FEATURES",
	setProtocolFeatures: "SET_PROTOCOL_FEATURES", getQueueNum: "GET_QUEUE_NUM", setVringEnable: "SET_VRING_ENABLE",
	getConfig: "GET_CONFIG", setConfig: "SET_CONFIG", getInflight: "GET_INFLIGHT_FD", setInflight: "SET_INFLIGHT_FD",
}

func (r request) String() string {
	if n, ok := requestNames[r]; ok {
		return n
	}
	return fmt.Sprintf("request %d", uint32(r))
}

// Header: request, flags, length of the payload, each a little-endian 32-bit word.
const (
	headerSize   = 12
	maxPayload   = 1024 // the largest of ours is a memory table of 8 regions: 264
	flagVersion  = 1
	flagsVersion = 3
	flagReply    = 1 << 2
	flagNeedAck  = 1 << 3
)

// Protocol features that are offered (vhost-user specification, "Protocol features").
const (
	protoQueues   = 1 << 0  // MQ: the number of queues can be asked for
	protoAck      = 1 << 3  // REPLY_ACK
	protoConfig   = 1 << 9  // CONFIG
	protoInflight = 1 << 12 // INFLIGHT_SHMFD

	protoNeeded  = protoQueues | protoAck | protoConfig
	protoOffered = protoNeeded | protoInflight

	// featureProtocol is VHOST_USER_F_PROTOCOL_FEATURES among the device's features.
	featureProtocol uint64 = 1 << 30
)

type header struct {
	request request
	flags   uint32
	size    uint32
}

// parseHeader checks a header; b has headerSize bytes.
func parseHeader(b []byte) (header, error) {
	le := binary.LittleEndian
	h := header{request(le.Uint32(b)), le.Uint32(b[4:]), le.Uint32(b[8:])}
	if h.flags&flagsVersion != flagVersion || h.flags&flagReply != 0 {
		return h, fmt.Errorf("%w: %v with flags %#x at offset 4", ErrProtocol, h.request, h.flags)
	}
	if h.size > maxPayload {
		return h, fmt.Errorf("%w: %v of %d bytes at offset 8, the limit is %d", ErrProtocol, h.request, h.size, maxPayload)
	}
	return h, nil
}

// reply encodes an answer to a request.
func reply(r request, payload []byte) []byte {
	b := make([]byte, headerSize, headerSize+len(payload))
	le := binary.LittleEndian
	le.PutUint32(b, uint32(r))
	le.PutUint32(b[4:], flagVersion|flagReply)
	le.PutUint32(b[8:], uint32(len(payload)))
	return append(b, payload...)
}

// Payloads. Each parser takes exactly its length.

func want(p []byte, n int) error {
	if len(p) != n {
		return fmt.Errorf("%w: payload of %d bytes, want %d", ErrProtocol, len(p), n)
	}
	return nil
}

func parseU64(p []byte) (uint64, error) {
	if err := want(p, 8); err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint64(p), nil
}

func u64(v uint64) []byte { return binary.LittleEndian.AppendUint64(nil, v) }

// vringState is a queue's index and a number.
type vringState struct{ index, num uint32 }

func parseVringState(p []byte) (vringState, error) {
	if err := want(p, 8); err != nil {
		return vringState{}, err
	}
	le := binary.LittleEndian
	return vringState{le.Uint32(p), le.Uint32(p[4:])}, nil
}

func (s vringState) bytes() []byte {
	return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, s.index), s.num)
}

// vringAddr is where a queue's areas are, as addresses of the front end's own.
type vringAddr struct {
	index, flags            uint32
	desc, used, avail, logs uint64
}

func parseVringAddr(p []byte) (vringAddr, error) {
	if err := want(p, 40); err != nil {
		return vringAddr{}, err
	}
	le := binary.LittleEndian
	return vringAddr{le.Uint32(p), le.Uint32(p[4:]), le.Uint64(p[8:]), le.Uint64(p[16:]), le.Uint64(p[24:]), le.Uint64(p[32:])}, nil
}

// region is one range of guest memory.
type region struct {
	guest, size, user, offset uint64 // guest-physical, length, the front end's address, offset in the file
}

// maxRegions is what a memory table may hold (without CONFIGURE_MEM_SLOTS).
const maxRegions = 8

func parseMemTable(p []byte) ([]region, error) {
	if len(p) < 8 {
		return nil, fmt.Errorf("%w: memory table of %d bytes", ErrProtocol, len(p))
	}
	le := binary.LittleEndian
	n := le.Uint32(p)
	if n == 0 || n > maxRegions {
		return nil, fmt.Errorf("%w: memory table of %d regions at offset 0, the limit is %d", ErrProtocol, n, maxRegions)
	}
	if err := want(p, int(8+32*n)); err != nil {
		return nil, err
	}
	regions := make([]region, n)
	for i := range regions {
		e := p[8+32*i:]
		regions[i] = region{le.Uint64(e), le.Uint64(e[8:]), le.Uint64(e[16:]), le.Uint64(e[24:])}
	}
	return regions, nil
}

// configHead precedes device configuration space.
const (
	configHead = 12
	maxConfig  = 256
)

func parseConfig(p []byte) (offset, size uint32, err error) {
	if len(p) < configHead {
		return 0, 0, fmt.Errorf("%w: configuration of %d bytes", ErrProtocol, len(p))
	}
	le := binary.LittleEndian
	offset, size = le.Uint32(p), le.Uint32(p[4:])
	if size > maxConfig || offset > maxConfig-size {
		return 0, 0, fmt.Errorf("%w: configuration of %d bytes at %d, there are %d", ErrProtocol, size, offset, maxConfig)
	}
	return offset, size, want(p, configHead+int(size))
}

// inflightHead describes the region that outlives a back end.
type inflightHead struct {
	size, offset  uint64
	queues, depth uint16
}

func parseInflight(p []byte) (inflightHead, error) {
	// The structure is 20 bytes; C pads it to 24, and front ends send either.
	if len(p) != 20 && len(p) != 24 {
		return inflightHead{}, fmt.Errorf("%w: in-flight description of %d bytes, want 20", ErrProtocol, len(p))
	}
	le := binary.LittleEndian
	return inflightHead{le.Uint64(p), le.Uint64(p[8:]), le.Uint16(p[16:]), le.Uint16(p[18:])}, nil
}

// bytes has the length of the description that was asked with.
func (h inflightHead) bytes(length int) []byte {
	b := make([]byte, length)
	le := binary.LittleEndian
	le.PutUint64(b, h.size)
	le.PutUint64(b[8:], h.offset)
	le.PutUint16(b[16:], h.queues)
	le.PutUint16(b[18:], h.depth)
	return b
}
