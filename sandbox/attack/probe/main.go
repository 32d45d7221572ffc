// Command probe is the program that tests run inside and outside of a sandbox. It is its own
// launcher.
package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/sandbox"
	"redoubt.dev/redoubt/sandbox/attack"
)

func main() {
	if os.Getenv("GOMAXPROCS") == "1" {
		// In a launcher: threads that exist before it does anything.
		threads()
	}
	sandbox.LauncherMain()
	if len(os.Args) < 2 {
		os.Exit(2)
	}
	switch os.Args[1] {
	case "exit":
	case "busy": // what a Go program does anyway
		busy()
		fmt.Println("done")
	case "serve": // until standard input ends, with threads
		threads()
		fmt.Println("ready")
		_, _ = os.Stdin.Read(make([]byte, 1))
	case "memory": // more than it may have
		var keep [][]byte
		for range 512 {
			b := make([]byte, 1<<20)
			for i := 0; i < len(b); i += 4096 {
				b[i] = 1
			}
			keep = append(keep, b)
		}
		fmt.Println("allowed", len(keep))
	case "files": // a writable directory and a read-only one
		fmt.Println(os.WriteFile("/state/new", []byte("x"), 0o600), os.WriteFile("/readonly/new", nil, 0o600), os.WriteFile("/new", nil, 0o600))
		b, err := os.ReadFile("/readonly/file")
		fmt.Printf("%s %v\n", b, err)
	case "caps": // makes a packet socket, for which NET_RAW is needed
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
		fmt.Println(fd >= 0, err)
	case "interface": // makes a bridge, for which NET_ADMIN is needed
		b := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "probe"}}
		fmt.Println(errors.Join(netlink.LinkAdd(b), netlink.LinkDel(b)))
	case "late": // a call outside the list once it is told to
		fmt.Println("ready")
		_, _ = os.Stdin.Read(make([]byte, 1))
		_, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		fmt.Println(err)
	case "kvm":
		kvm()
	case "descriptors":
		for fd := 3; fd < 64; fd++ {
			if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
				fmt.Println("descriptor", fd)
			}
		}
	default:
		if err := attack.Main(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
}

// threads makes threads and leaves them.
func threads() {
	var up sync.WaitGroup
	for range 6 {
		up.Add(1)
		go func() {
			runtime.LockOSThread()
			up.Done()
			select {}
		}()
	}
	up.Wait()
}

func busy() {
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			runtime.LockOSThread()
			var keep [][]byte
			for i := range 200 {
				keep = append(keep, make([]byte, 64<<10))
				if i%50 == 0 {
					keep = nil
					runtime.GC()
				}
			}
			t := time.NewTimer(5 * time.Millisecond)
			<-t.C
			runtime.KeepAlive(keep)
		})
	}
	r, w, err := os.Pipe()
	if err == nil {
		wg.Go(func() { _, _ = w.WriteString("x"); w.Close() })
		_, _ = r.Read(make([]byte, 4))
	}
	wg.Wait()
}

// kvm asks /dev/kvm, descriptor 3, for its version, and then for what no list has.
func kvm() {
	v, err := unix.IoctlRetInt(3, 0xae00)
	fmt.Println("version", v, err)
	n, err := unix.IoctlRetInt(3, 0xae0c) // none
	fmt.Println("allowed", n, err)
}
