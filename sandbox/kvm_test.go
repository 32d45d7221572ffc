package sandbox

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// The list of an emulator's ioctls is that of package kvm: all of its requests, no other.
func TestKVMList(t *testing.T) {
	src, err := os.ReadFile("../kvm/abi.go")
	if err != nil {
		t.Fatal(err)
	}
	want := map[uint32]bool{}
	for _, m := range regexp.MustCompile(`(?m)^\tkvm\w+ += (0x[0-9a-f]+)$`).FindAllSubmatch(src, -1) {
		n, err := strconv.ParseUint(string(m[1]), 0, 32)
		if err != nil {
			t.Fatal(err)
		}
		want[uint32(n)] = true
	}
	if len(want) < 20 {
		t.Fatalf("%d requests found in package kvm", len(want))
	}
	p := goPolicy(t, "include kvm")
	allowed := func(request uint32) bool {
		d := seccompData{number: unix.SYS_IOCTL, arch: unix.AUDIT_ARCH_X86_64, args: [6]uint64{3, uint64(request)}}
		return p.decide(d, 0) == unix.SECCOMP_RET_ALLOW
	}
	for r := range want {
		if !allowed(r) {
			t.Errorf("request %#x is not in the list", r)
		}
	}
	for direction := range uint32(4) {
		for number := range uint32(256) {
			for _, size := range []uint32{0, 1, 4, 8, 12, 16, 24, 32, 48, 64, 144, 312} {
				r := direction<<30 | size<<16 | 0xae00 | number
				if allowed(r) && !want[r] {
					t.Errorf("request %#x is in the list and not in package kvm", r)
				}
			}
		}
	}
	for _, r := range []uint32{unix.TIOCSTI, unix.TUNSETIFF, unix.FS_IOC_SETFLAGS, unix.SIOCSIFFLAGS} {
		if allowed(r) {
			t.Errorf("request %#x is allowed", r)
		}
	}
}

// An inherited /dev/kvm answers what the list has; any other request ends the emulator.
func TestKVMRequests(t *testing.T) {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("needs /dev/kvm, of any KVM: %v", err)
	}
	defer f.Close()
	cmd := exec.Command(probe(t), "kvm")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.ExtraFiles = []*os.File{f}
	g, err := (&Host{Launcher: probe(t)}).Prepare(cmd, &Spec{
		Name: "emulator", UID: testID, GID: testID, Policy: goPolicy(t, "include kvm"),
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Start(); err != nil {
		t.Fatal(err)
	}
	err = g.Wait()
	var v *Violation
	if !errors.As(err, &v) || v.Call != "ioctl" || v.Args[1] != 0xae0c || out.String() != "version 12 <nil>\n" {
		t.Errorf("%q, %v", out.String(), err)
	}
}
