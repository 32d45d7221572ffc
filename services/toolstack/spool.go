package toolstack

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/eintr"
)

// maxLog bounds a console's log file, in bytes: a guest that prints for ever fills no disk. Of one that is full the newer
// half stays.
const maxLog = 16 << 20

// A spool brings what a guest prints into its console's log, by way of a pipe. Whenever this process is
// killed, each byte comes to the log once: the kernel moves it (splice(2)) from the socket into the pipe and from there
// into the file, whose offset moves along. The Builder keeps all three, and the next toolstack goes on. What a full disk takes no
// more of is shown and not logged.
type spool struct {
	socket syscall.RawConn
	log    *os.File
	pipe   [2]*os.File // its ends to read and to write; neither blocks
	r, w   int         // their descriptors
	logFD  int
	logged int64 // the log's size, and its offset
}

// newSpool takes the files over, and not the console's end.
func newSpool(console *net.UnixConn, log *os.File, pipe [2]*os.File) (*spool, error) {
	s := &spool{log: log, pipe: pipe}
	socket, err := console.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	s.socket = socket
	for _, f := range []struct {
		file *os.File
		fd   *int
	}{{log, &s.logFD}, {pipe[0], &s.r}, {pipe[1], &s.w}} {
		c, err := f.file.SyscallConn()
		if err == nil {
			err = c.Control(func(fd uintptr) { *f.fd = int(fd) }) // (*os.File).Fd would make it block
		}
		if err != nil {
			return nil, errors.Join(err, s.Close())
		}
	}
	if s.logged, err = log.Seek(0, io.SeekCurrent); err == nil {
		err = s.halve() // the last toolstack may not have lived to do so whole
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// Close closes the files.
func (s *spool) Close() error {
	return errors.Join(s.log.Close(), s.pipe[0].Close(), s.pipe[1].Close())
}

// tail is the end of what the log holds already.
func (s *spool) tail() []byte {
	from := max(0, s.logged-scrollback)
	b := make([]byte, s.logged-from)
	n, _ := s.log.ReadAt(b, from) // what cannot be read is not shown
	return b[:n]
}

// next waits until the guest prints, logs that and says it.
func (s *spool) next(buf []byte) (int, error) {
	for {
		if n, err := s.drain(buf); n > 0 || err != nil {
			return n, err
		}
		if err := s.fill(len(buf)); err != nil {
			return 0, err
		}
	}
}

// fill waits for the guest and takes what it printed into the pipe.
func (s *spool) fill(most int) error {
	var n int
	var err error
	if rerr := s.socket.Read(func(fd uintptr) bool {
		n, err = splice(int(fd), s.w, most)
		return !errors.Is(err, unix.EAGAIN)
	}); rerr != nil {
		return rerr
	}
	if err == nil && n == 0 {
		return io.EOF
	}
	return err
}

// drain logs what the pipe holds, which may be nothing.
func (s *spool) drain(buf []byte) (int, error) {
	if s.logged >= maxLog {
		_ = s.halve()
	}
	if room := min(int64(len(buf)), maxLog-s.logged); room > 0 {
		n, err := splice(s.r, s.logFD, int(room))
		if errors.Is(err, unix.EAGAIN) {
			return 0, nil
		}
		if n > 0 {
			got, _ := s.log.ReadAt(buf[:n], s.logged) // what cannot be read is not shown
			s.logged += int64(n)
			return got, nil
		}
	}
	n, err := unix.Read(s.r, buf)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
		return 0, nil
	}
	return max(n, 0), err
}

// halve makes room in a full log. Each step may be done again by the next toolstack: until the file is cut its newer
// half is there, and after that its offset lies beyond its end.
func (s *spool) halve() error {
	st, err := s.log.Stat()
	if err != nil || (st.Size() < maxLog && st.Size() == s.logged) {
		return err
	}
	size := st.Size()
	if size >= maxLog {
		size = maxLog / 2
		newer := io.NewSectionReader(s.log, st.Size()-size, size)
		if _, err := io.Copy(io.NewOffsetWriter(s.log, 0), newer); err != nil {
			return err
		}
		if err := s.log.Truncate(size); err != nil {
			return err
		}
	}
	s.logged, err = s.log.Seek(size, io.SeekStart)
	return err
}

// splice moves n bytes at most without waiting for any.
func splice(from, to, n int) (int, error) {
	moved, err := eintr.Value(func() (int64, error) { return unix.Splice(from, nil, to, nil, n, unix.SPLICE_F_NONBLOCK) })
	return int(max(moved, 0)), err
}
