package attack

import (
	"errors"
	"fmt"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The host's network, against a process that has a network of its own, and perhaps CAP_NET_ADMIN
// in that. A victim's interface is a tap in the host's.

// makeInterface makes the victim's interface; it goes with the process.
func makeInterface() string {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return ""
	}
	ifr, err := unix.NewIfreq(fmt.Sprintf("rtvic%d", os.Getpid()))
	if err != nil {
		return ""
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return ""
	}
	return ifr.Name()
}

func hostInterface(v *Victim) (netlink.Link, error) {
	if v.Interface == "" {
		return nil, fmt.Errorf("%w: no /dev/net/tun", ErrUnavailable)
	}
	all, err := netlink.LinkList()
	if err != nil {
		return nil, err
	}
	for _, l := range all {
		if l.Attrs().Name == v.Interface {
			return l, nil
		}
	}
	return nil, fmt.Errorf("is not among %d interfaces", len(all))
}

func seeInterface(v *Victim) error {
	_, err := hostInterface(v)
	return err
}

// changeInterface tries netlink, and the ioctl on a socket of any family.
func changeInterface(v *Victim) error {
	l, err := hostInterface(v)
	if err == nil {
		return netlink.LinkSetMTU(l, 1400)
	}
	if errors.Is(err, ErrUnavailable) {
		return err
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq(v.Interface)
	if err != nil {
		return err
	}
	ifr.SetUint32(1400)
	return unix.IoctlIfreq(fd, unix.SIOCSIFMTU, ifr)
}

// addInterface tries to put one end of a pair into the network of the victim, which is the host's.
func addInterface(v *Victim) error {
	name := fmt.Sprintf("rtatk%d", os.Getpid())
	a := netlink.NewLinkAttrs()
	a.Name = name
	err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: a, PeerName: name + "p", PeerNamespace: netlink.NsPid(v.PID)})
	if errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("%w: pairs of interfaces: %w", ErrUnavailable, err)
	}
	if err != nil {
		return err
	}
	return netlink.LinkDel(&netlink.Veth{LinkAttrs: a})
}

// nameNamespace gives the victim's network a number, by which requests could then be sent there.
func nameNamespace(v *Victim) error {
	const id = 7733
	err := netlink.SetNetNsIdByPid(v.PID, id)
	if errors.Is(err, unix.EEXIST) { // it has one already
		return nil
	}
	return err
}
