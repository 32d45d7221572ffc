package vhostuser

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// errRefused is a negative acknowledgement.
var errRefused = errors.New("refused the request")

// peer is one connection to a back end. Requests are made by one goroutine at a time; another
// reads, to notice the end.
type peer struct {
	c       *net.UnixConn
	replies chan peerReply // unbuffered: one request at a time
	gone    chan struct{}  // closed when reading has ended
	quit    chan struct{}  // closed by close
	file    *os.File       // came with the last reply
}

type peerReply struct {
	header
	payload []byte
	files   []*os.File
}

func newPeer(c *net.UnixConn) *peer {
	p := &peer{c: c, replies: make(chan peerReply), gone: make(chan struct{}), quit: make(chan struct{})}
	go p.read()
	return p
}

func (p *peer) ended() bool {
	select {
	case <-p.gone:
		return true
	default:
		return false
	}
}

// close ends the connection and waits until the back end has ended it, too: it does so once it
// touches guest memory no more (as the kernel does for one that is killed).
func (p *peer) close() {
	close(p.quit)
	_ = p.c.CloseWrite()
	<-p.gone
	if p.file != nil {
		p.file.Close()
		p.file = nil
	}
}

func (p *peer) read() {
	defer close(p.gone)
	for {
		r, err := readReply(p.c)
		if err != nil {
			_ = p.c.Close()
			return
		}
		select {
		case p.replies <- r:
		case <-p.quit:
			closeAll(r.files) // nobody waits for it any more
		}
	}
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

func readReply(c *net.UnixConn) (r peerReply, err error) {
	m := &message{}
	s := conn{c: c}
	defer func() {
		if err != nil {
			m.closeFiles()
		}
	}()
	var head [headerSize]byte
	if err := s.fill(m, head[:], true); err != nil {
		return r, err
	}
	le := binary.LittleEndian
	r.header = header{request(le.Uint32(head[:])), le.Uint32(head[4:]), le.Uint32(head[8:])}
	if r.flags&(flagsVersion|flagReply) != flagVersion|flagReply || r.size > maxPayload {
		return r, fmt.Errorf("%w: reply with flags %#x and %d bytes", ErrBackEnd, r.flags, r.size)
	}
	r.payload = make([]byte, r.size)
	err = s.fill(m, r.payload, false)
	r.files = m.files
	return r, err
}

func (p *peer) send(r request, flags uint32, payload []byte, files ...*os.File) error {
	b := make([]byte, headerSize, headerSize+len(payload))
	le := binary.LittleEndian
	le.PutUint32(b, uint32(r))
	le.PutUint32(b[4:], flagVersion|flags)
	le.PutUint32(b[8:], uint32(len(payload)))
	var oob []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			raw, err := f.SyscallConn()
			if err != nil {
				return err
			}
			// Fd would make the file blocking for everybody who shares it.
			if err := raw.Control(func(fd uintptr) { fds[i] = int(fd) }); err != nil {
				return err
			}
		}
		oob = unix.UnixRights(fds...)
	}
	_, _, err := p.c.WriteMsgUnix(append(b, payload...), oob, nil)
	return err
}

// receive waits for the reply to r.
func (p *peer) receive(r request) ([]byte, error) {
	select {
	case got := <-p.replies:
		if got.request != r {
			closeAll(got.files)
			return nil, fmt.Errorf("%w: answered %v with %v", ErrBackEnd, r, got.request)
		}
		if p.file != nil {
			p.file.Close()
			p.file = nil
		}
		if len(got.files) > 0 {
			p.file = got.files[0]
			closeAll(got.files[1:])
		}
		return got.payload, nil
	case <-p.gone:
		return nil, io.EOF
	}
}

func (p *peer) takeFile() *os.File {
	f := p.file
	p.file = nil
	return f
}

// ask makes a request that has an answer of its own.
func (p *peer) ask(r request, payload []byte) ([]byte, error) {
	if err := p.send(r, 0, payload); err != nil {
		return nil, err
	}
	return p.receive(r)
}

func (p *peer) askU64(r request) (uint64, error) {
	b, err := p.ask(r, nil)
	if err != nil {
		return 0, err
	}
	return parseU64(b)
}

// An order is a request that is acknowledged.
type order struct {
	request request
	payload []byte
	files   []*os.File
}

// do gives orders, all before it waits for the first acknowledgement: a back end carries them out in their order. Which of
// those were carried out that follow a refused one is not known.
func (p *peer) do(all ...order) error {
	for _, o := range all {
		if err := p.send(o.request, flagNeedAck, o.payload, o.files...); err != nil {
			return err
		}
	}
	var refused error
	for _, o := range all {
		b, err := p.receive(o.request)
		if err != nil {
			return err
		}
		code, err := parseU64(b)
		if err != nil {
			return err
		}
		if code != 0 && refused == nil {
			refused = fmt.Errorf("%w: %v %w", ErrBackEnd, o.request, errRefused)
		}
	}
	return refused
}
