package vhostuser

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// ErrBackEnd says that the back end refused a request or cannot do what the device was set up
// with. A back end that is gone is no error: the next one is told everything again.
var ErrBackEnd = errors.New("vhost-user: back end")

// Region is one range of guest memory in a file.
type Region struct {
	Guest, Size, Offset uint64 // guest-physical address, length in bytes, place in the file
	File                *os.File
}

// QueueSetup is a queue as the guest's driver has set it up. Areas are guest-physical addresses
// of the descriptor, driver and device area.
type QueueSetup struct {
	Size       uint16
	Areas      [3]uint64
	Base       uint16 // the next available entry; it counts only for a queue that begins
	Kick, Call *os.File
}

// A Frontend is an emulator's side of one device. It keeps all that the device was told and the
// in-flight region, so that back ends can come and go: [Frontend.Connect] brings a new one to
// where the last one was. While there is none, the guest's requests wait in its rings and every
// call here succeeds at once.
//
// Files stay the caller's and must be open as long as the front end is. All methods may be called
// by several goroutines.
type Frontend struct {
	depth uint16 // of the longest queue

	mu       sync.Mutex
	peer     *peer         // nil while there is no back end
	arrival  chan struct{} // closed when the next one is there
	known    bool          // protocol, offered and config were asked for
	protocol uint64
	offered  uint64
	config   []byte
	features uint64
	regions  []Region
	flight   *os.File // nil for a device that is in order
	head     inflightHead
	flown    []byte // the region, mapped
	queues   []frontQueue
}

type frontQueue struct {
	setup   QueueSetup
	running bool
}

// NewFrontend makes the front end of a device with queues of at most depth entries.
func NewFrontend(queues int, depth uint16) *Frontend {
	return &Frontend{depth: depth, queues: make([]frontQueue, queues), arrival: make(chan struct{})}
}

// Close ends the connection, if there is one, and the front end.
func (f *Frontend) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lose()
	var err error
	if f.flown != nil {
		err = errors.Join(unix.Munmap(f.flown), f.flight.Close())
		f.flown, f.flight = nil, nil
	}
	return err
}

// Connect takes c over as the connection to a back end, in place of the last one, and brings that
// back end to where the device is. When it returns nil the guest is served until gone is closed:
// the connection has ended. It may have already, by what the guest has put in its queues.
func (f *Frontend) Connect(c *net.UnixConn) (gone <-chan struct{}, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lose()
	f.peer = newPeer(c)
	gone = f.peer.gone
	if err := f.greet(); err != nil {
		f.lose()
		return nil, fmt.Errorf("%w: %w", ErrBackEnd, err)
	}
	close(f.arrival)
	f.arrival = make(chan struct{})
	return gone, nil
}

// greet negotiates and replays. f.mu is held.
func (f *Frontend) greet() error {
	offered, err := f.peer.askU64(getFeatures)
	if err != nil {
		return err
	}
	if need := f.features | featureProtocol; offered&need != need {
		return fmt.Errorf("offers features %#x, the guest uses %#x", offered, need)
	}
	protocol, err := f.peer.askU64(getProtocolFeatures)
	if err != nil {
		return err
	}
	if protocol&protoNeeded != protoNeeded {
		return fmt.Errorf("offers protocol features %#x, needed are %#x", protocol, protoNeeded)
	}
	protocol &= protoOffered
	if f.known && protocol != f.protocol {
		return fmt.Errorf("offers protocol features %#x, the last one did %#x", protocol, f.protocol)
	}
	// Acknowledgements begin after this one.
	if err := f.peer.send(setProtocolFeatures, 0, u64(protocol)); err != nil {
		return err
	}
	n, err := f.peer.askU64(getQueueNum)
	if err != nil {
		return err
	}
	if n < uint64(len(f.queues)) {
		return fmt.Errorf("has %d queues, needed are %d", n, len(f.queues))
	}
	config, err := f.peer.ask(getConfig, append(configRequest(maxConfig), make([]byte, maxConfig)...))
	if err != nil {
		return err
	}
	if len(config) != configHead+maxConfig {
		return fmt.Errorf("configuration of %d bytes", len(config))
	}
	config = config[configHead:]
	if f.known && (string(config) != string(f.config)) {
		return errors.New("is another device: its configuration differs")
	}
	f.known, f.protocol, f.offered, f.config = true, protocol, offered&^featureProtocol, config
	// Not f.do, which takes the end of the connection for no error and leaves no peer: the replay
	// below does, since a queue that the guest broke ends every back end.
	if err := f.peer.do(order{request: setOwner}); err != nil {
		return err
	}
	if err := f.peer.do(order{setFeatures, u64(f.features | featureProtocol), nil}); err != nil {
		return err
	}
	tracked := protocol&protoInflight != 0
	if tracked && f.flight == nil {
		if err := f.askInflight(); err != nil {
			return err
		}
	}
	if f.regions != nil {
		if err := f.tellMemory(); err != nil {
			return err
		}
	}
	if tracked {
		if err := f.do(order{setInflight, f.head.bytes(24), []*os.File{f.flight}}); err != nil {
			return err
		}
	}
	for i := range f.queues {
		if f.queues[i].running {
			if err := f.tellQueue(i); err != nil {
				return err
			}
		}
	}
	return nil
}

func configRequest(n uint32) []byte {
	le := binary.LittleEndian
	return le.AppendUint32(le.AppendUint32(le.AppendUint32(nil, 0), n), 0)
}

func (f *Frontend) askInflight() error {
	ask := inflightHead{queues: uint16(len(f.queues)), depth: f.depth}
	p, err := f.peer.ask(getInflight, ask.bytes(24))
	if err != nil {
		return err
	}
	file := f.peer.takeFile()
	if file == nil {
		return errors.New("gave no in-flight region")
	}
	h, err := parseInflight(p)
	if err == nil && (h.queues != ask.queues || h.depth != ask.depth) {
		err = fmt.Errorf("in-flight region for %d queues of %d", h.queues, h.depth)
	}
	var b []byte
	if err == nil {
		b, err = mapInflight(h, file)
	}
	if err != nil {
		return errors.Join(err, file.Close())
	}
	f.flight, f.head, f.flown = file, h, b
	return nil
}

// Served reports whether a back end is connected.
func (f *Frontend) Served() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.peer != nil && !f.peer.ended()
}

// Offered are the device's features, once a back end has been connected.
func (f *Frontend) Offered() uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.offered
}

// ReadConfig fills p from the device's configuration at offset.
func (f *Frontend) ReadConfig(offset uint64, p []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if offset < uint64(len(f.config)) {
		copy(p, f.config[offset:])
	}
}

// SetFeatures tells which features the driver took; no queue runs.
func (f *Frontend) SetFeatures(v uint64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.features = v
	return f.do(order{setFeatures, u64(v | featureProtocol), nil})
}

// SetMemory tells where guest memory is; running queues go on with it.
func (f *Frontend) SetMemory(regions []Region) error {
	if len(regions) == 0 || len(regions) > maxRegions {
		return fmt.Errorf("vhost-user: %d memory regions, at most %d", len(regions), maxRegions)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.regions = append([]Region(nil), regions...)
	return f.tellMemory()
}

// tellMemory sends the table. The front end's own addresses are the guest-physical ones: they
// serve only to find ring areas again.
func (f *Frontend) tellMemory() error {
	b := binary.LittleEndian.AppendUint64(nil, uint64(len(f.regions)))
	var files []*os.File
	for _, r := range f.regions {
		for _, v := range [...]uint64{r.Guest, r.Size, r.Guest, r.Offset} {
			b = binary.LittleEndian.AppendUint64(b, v)
		}
		files = append(files, r.File)
	}
	return f.do(order{setMemTable, b, files})
}

// StartQueue lets a queue run.
func (f *Frontend) StartQueue(i int, q QueueSetup) error {
	if q.Size == 0 || q.Size > f.depth {
		return fmt.Errorf("vhost-user: queue %d of %d entries, at most %d", i, q.Size, f.depth)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.forget(i)
	f.queues[i] = frontQueue{q, true}
	return f.tellQueue(i)
}

// SetCall replaces the eventfd of a running queue's interrupts.
func (f *Frontend) SetCall(i int, call *os.File) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.queues[i].setup.Call = call
	if !f.queues[i].running {
		return nil
	}
	return f.do(order{setVringCall, u64(uint64(i)), []*os.File{call}})
}

func (f *Frontend) tellQueue(i int) error {
	q, n := f.queues[i].setup, uint32(i)
	le := binary.LittleEndian
	areas := le.AppendUint32(le.AppendUint32(nil, n), 0)
	for _, a := range [...]uint64{q.Areas[0], q.Areas[2], q.Areas[1], 0} {
		areas = le.AppendUint64(areas, a)
	}
	return f.do(
		order{setVringNum, vringState{n, uint32(q.Size)}.bytes(), nil},
		order{setVringBase, vringState{n, uint32(q.Base)}.bytes(), nil},
		order{setVringAddr, areas, nil},
		order{setVringCall, u64(uint64(i)), []*os.File{q.Call}},
		order{setVringKick, u64(uint64(i)), []*os.File{q.Kick}},
		order{setVringEnable, vringState{n, 1}.bytes(), nil},
	)
}

// StopQueue stops a queue that is to go on later: when it returns, every request that was taken is
// given back and nothing touches the queue's memory. base is the next available entry. Without
// a back end it waits for one, or for ctx.
func (f *Frontend) StopQueue(ctx context.Context, i int) (base uint16, err error) {
	for {
		base, done, arrival, err := f.tryStop(i)
		if done || err != nil {
			return base, err
		}
		select {
		case <-arrival:
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
}

// tryStop stops a queue if there is a back end to do it; else arrival is closed when one comes.
func (f *Frontend) tryStop(i int) (base uint16, done bool, arrival <-chan struct{}, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	q := &f.queues[i]
	if !q.running {
		return 0, true, nil, nil
	}
	if f.peer == nil {
		return 0, false, f.arrival, nil
	}
	p, err := f.peer.ask(getVringBase, vringState{uint32(i), 0}.bytes())
	if err != nil {
		f.lose()
		return 0, false, f.arrival, nil
	}
	q.running = false
	f.forget(i)
	s, err := parseVringState(p)
	return uint16(s.num), true, nil, err
}

// DropQueue stops a queue that the guest's driver has reset: when it returns, nothing touches its
// memory. It waits for no back end: what one took and did not give back is forgotten, as the
// driver has forgotten it.
func (f *Frontend) DropQueue(i int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.queues[i].running && f.peer != nil {
		if _, err := f.peer.ask(getVringBase, vringState{uint32(i), 0}.bytes()); err != nil {
			f.lose()
		}
	}
	f.queues[i].running = false
	f.forget(i)
}

// forget clears a queue's in-flight entries. f.mu is held.
func (f *Frontend) forget(i int) {
	if f.flown != nil {
		clear(newTracker(f.flown, i, f.head.depth).b)
	}
}

// do makes requests that are acknowledged. Without a back end they are put off until there is one.
func (f *Frontend) do(all ...order) error {
	if f.peer == nil {
		return nil
	}
	err := f.peer.do(all...)
	if err != nil && !errors.Is(err, errRefused) {
		f.lose()
		return nil
	}
	return err
}

// lose ends the connection; afterwards the back end touches nothing. f.mu is held.
func (f *Frontend) lose() {
	if f.peer != nil {
		f.peer.close()
		f.peer = nil
	}
}
