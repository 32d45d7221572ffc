package engine

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"syscall"

	"redoubt.dev/redoubt/programs"
)

// fakeStarter runs this test binary in place of swtpm, to misbehave in the way it says.
type fakeStarter string

func (f fakeStarter) Start(_ context.Context, p programs.Program) (programs.Running, error) {
	cmd := exec.Command(os.Args[0], p.Args(p.Dir)...)
	cmd.Env = append(os.Environ(), "REDOUBT_TEST_FAKE_ENGINE="+string(f))
	return programs.StartChild(cmd, p)
}

// fakeEngine speaks swtpm's control protocol on descriptor 3, a byte at a time.
func fakeEngine(mode string) {
	must := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, "fake engine:", err)
			os.Exit(3)
		}
	}
	f := os.NewFile(3, "control")
	c, err := net.FileConn(f)
	must(err)
	ctl := c.(*net.UnixConn)
	split := func(w io.Writer, b []byte) {
		for i := range b {
			_, err := w.Write(b[i : i+1])
			must(err)
		}
	}
	ok := make([]byte, 4)
	var data *os.File
	for {
		buf, oob := make([]byte, 64), make([]byte, 64)
		n, oobn, _, _, err := ctl.ReadMsgUnix(buf, oob)
		if err != nil || n < 4 {
			return
		}
		switch ctlCommand(binary.BigEndian.Uint32(buf)) {
		case ctlGetCapability:
			switch mode {
			case "die":
				fmt.Fprintln(os.Stderr, "cannot go on")
				os.Exit(7)
			case "mute":
				continue
			case "garbage":
				split(ctl, []byte("garbage!"))
				continue
			case "short":
				split(ctl, []byte{0, 0})
				os.Exit(0)
			case "old":
				split(ctl, append(ok, 0, 0, 0, 1))
				continue
			}
			split(ctl, append(ok, 0, 0, 0xff, 0xff))
		case ctlSetDataFD:
			msgs, err := syscall.ParseSocketControlMessage(oob[:oobn])
			must(err)
			fds, err := syscall.ParseUnixRights(&msgs[0])
			must(err)
			data = os.NewFile(uintptr(fds[0]), "data")
			go fakeData(mode, data, split)
			split(ctl, ok)
		case ctlInit:
			if mode == "init-fails" {
				split(ctl, []byte{0, 0, 0, 9})
				continue
			}
			split(ctl, ok)
		case ctlShutdown:
			split(ctl, ok)
			os.Exit(0)
		default:
			split(ctl, ok)
		}
	}
}

// fakeData answers commands.
func fakeData(mode string, data io.ReadWriter, split func(io.Writer, []byte)) {
	good := []byte{0x80, 0x01, 0, 0, 0, 10, 0, 0, 0, 0}
	for {
		if _, err := data.Read(make([]byte, 4096)); err != nil {
			return
		}
		switch mode {
		case "data-tag":
			split(data, []byte("garbage garbage"))
		case "data-size":
			split(data, []byte{0x80, 0x01, 0, 0, 0xff, 0xff, 0, 0, 0, 0})
		case "data-small":
			split(data, []byte{0x80, 0x01, 0, 0, 0, 9, 0, 0, 0, 0})
		case "data-short":
			split(data, []byte{0x80, 0x01, 0, 0, 0, 12, 0, 0, 0, 0, 0})
			os.Exit(0)
		case "data-eof":
			split(data, good[:3])
			os.Exit(0)
		case "data-mute":
		case "data-die":
			os.Exit(9)
		default:
			split(data, good)
		}
	}
}
