package network

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/virtio"
)

// TunDevice is the device that taps are made with.
const TunDevice = "/dev/net/tun"

// OpenTun opens it for one tap, which will be in the calling thread's namespace (see
// [Namespace.Do]). The tap lives as long as anybody has this descriptor or a copy of it: who
// keeps one keeps the tap, its carrier and the frames that wait in it while the service that
// serves it is replaced.
func OpenTun() (*os.File, error) {
	fd, err := unix.Open(TunDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: TunDevice, Err: err}
	}
	return os.NewFile(uintptr(fd), TunDevice), nil
}

// A Tap is the host's end of a NIC. Frames pass through File, each behind a virtio_net_hdr.
type Tap struct {
	Name string
	File *os.File // does not block
}

const tapFlags = unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR

// NewTap makes a tap of an open TunDevice, or goes on with the one that was made of it. It takes
// tun over. Making needs CAP_NET_ADMIN in the namespace.
func NewTap(tun *os.File, name string) (*Tap, error) {
	defer tun.Close()
	raw, err := tun.SyscallConn()
	if err != nil {
		return nil, err
	}
	dup := -1
	if cerr := raw.Control(func(fd uintptr) {
		if err = bindTap(int(fd), name); err == nil {
			dup, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
		}
	}); cerr != nil {
		return nil, cerr
	}
	if err != nil {
		return nil, fmt.Errorf("tap %s: %w", name, err)
	}
	if err := unix.SetNonblock(dup, true); err != nil {
		return nil, errors.Join(err, unix.Close(dup))
	}
	return &Tap{name, os.NewFile(uintptr(dup), name)}, nil
}

func bindTap(fd int, name string) error {
	there, err := unix.NewIfreq("")
	if err != nil {
		return err
	}
	err = unix.IoctlIfreq(fd, unix.TUNGETIFF, there)
	switch {
	case err == nil && (there.Name() != name || there.Uint16()&tapFlags != tapFlags):
		return fmt.Errorf("the descriptor is of %q with flags %#x", there.Name(), there.Uint16())
	case err == nil:
		return nil
	case !errors.Is(err, unix.EBADFD): // not a tun descriptor at all
		return err
	}
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	// Exclusive: the name is not that of something that is there already.
	ifr.SetUint16(tapFlags | unix.IFF_TUN_EXCL)
	return unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
}

// Configure tells the kernel what the guest's driver takes: TCP segments that are not cut, frames with
// partial checksums, or only whole ones; and how long the header before each frame is.
func (t *Tap) Configure(features uint64, header int) error {
	raw, err := t.File.SyscallConn()
	if err != nil {
		return err
	}
	flags := offloads(features)
	if cerr := raw.Control(func(fd uintptr) {
		if err = unix.IoctlSetPointerInt(int(fd), unix.TUNSETVNETHDRSZ, header); err == nil {
			err = unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, flags)
		}
	}); cerr != nil {
		return cerr
	}
	if err != nil {
		return fmt.Errorf("tap %s: %w", t.Name, err)
	}
	return nil
}

// offloads are the features in the tap's terms. Of a driver that breaks their dependences (virtio 1.2
// §5.1.3.1), which the kernel would refuse, what depends is left out.
func offloads(features uint64) (flags int) {
	if features&virtio.NetFeatureGuestCsum == 0 {
		return 0
	}
	if features&virtio.NetFeatureGuestTSO4 != 0 {
		flags |= unix.TUN_F_TSO4
	}
	if features&virtio.NetFeatureGuestTSO6 != 0 {
		flags |= unix.TUN_F_TSO6
	}
	if flags != 0 && features&virtio.NetFeatureGuestECN != 0 {
		flags |= unix.TUN_F_TSO_ECN
	}
	return flags | unix.TUN_F_CSUM
}

// Port is the tap as a network device's.
func (t *Tap) Port() virtio.NetPort { return virtio.NetPort{File: t.File, Configure: t.Configure} }
