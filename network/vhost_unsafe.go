package network

import (
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Requests of linux/vhost.h.
const (
	vhostGetFeatures   = 0x8008af00
	vhostSetFeatures   = 0x4008af00
	vhostSetOwner      = 0xaf01
	vhostSetMemTable   = 0x4008af03
	vhostSetVringNum   = 0x4008af10
	vhostSetVringAddr  = 0x4028af11
	vhostSetVringBase  = 0x4008af12
	vhostSetVringKick  = 0x4008af20
	vhostSetVringCall  = 0x4008af21
	vhostNetSetBackend = 0x4008af30
)

// ioctlBytes makes a request whose argument is b, which may be changed by it.
func ioctlBytes(fd int, request uint, b []byte) error {
	var p unsafe.Pointer
	if len(b) > 0 {
		p = unsafe.Pointer(&b[0])
	}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(p))
	runtime.KeepAlive(b)
	if errno != 0 {
		return errno
	}
	return nil
}

// address is where mapped memory is in this process; it does not move.
func address(b []byte) uint64 { return uint64(uintptr(unsafe.Pointer(&b[0]))) }
