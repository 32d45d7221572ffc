package kvm

import (
	"errors"
	"os"
	"testing"
	"unsafe"
)

// The kernel's sizes (include/uapi/linux/kvm.h and arch/x86/include/uapi/asm/kvm.h).
func TestStructureSizes(t *testing.T) {
	for _, c := range []struct {
		name      string
		got, want uintptr
	}{
		{"kvm_run to its registers", unsafe.Offsetof(runHeader{}.regs), 304},
		{"kvm_run to its special registers", unsafe.Offsetof(runHeader{}.sregs), 448},
		{"kvm_regs", unsafe.Sizeof(Regs{}), 144},
		{"kvm_segment", unsafe.Sizeof(Segment{}), 24},
		{"kvm_dtable", unsafe.Sizeof(Table{}), 16},
		{"kvm_sregs", unsafe.Sizeof(Sregs{}), 312},
		{"kvm_cpuid_entry2", unsafe.Sizeof(CPUIDEntry{}), 40},
		{"kvm_msr_entry", unsafe.Sizeof(MSR{}), 16},
		{"kvm_clock_data", unsafe.Sizeof(Clock{}), 48},
		{"kvm_userspace_memory_region", unsafe.Sizeof(memoryRegion{}), 32},
		{"kvm_irq_level", unsafe.Sizeof(irqLevel{}), 8},
		{"kvm_irqfd", unsafe.Sizeof(irqFD{}), 32},
		{"kvm_ioeventfd", unsafe.Sizeof(ioEventFD{}), 64},
		{"kvm_coalesced_mmio_zone", unsafe.Sizeof(coalescedZone{}), 16},
		{"kvm_coalesced_mmio", unsafe.Sizeof(coalescedEntry{}), coalescedEntrySize},
		{"kvm_irq_routing_entry", unsafe.Sizeof(routeEntry{}), 48},
		{"kvm_enable_cap", unsafe.Sizeof(enableCap{}), 104},
		{"kvm_xcrs", unsafe.Sizeof(xcrs{}), 392},
		{"kvm_msr_filter", unsafe.Sizeof(msrFilter{}), 392},
		{"kvm_device_attr", unsafe.Sizeof(deviceAttr{}), 24},
		{"kvm_run up to its union's end", unsafe.Offsetof(runHeader{}.valid), 32 + 256},
	} {
		if c.got != c.want {
			t.Errorf("%s is %d bytes, the kernel's %d", c.name, c.got, c.want)
		}
	}
	var r runHeader
	if o := unsafe.Offsetof(r.exit); o != 32 {
		t.Errorf("kvm_run's union is at %d, the kernel's at 32", o)
	}
}

func TestNewRefusesOtherFiles(t *testing.T) {
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := New(f); err == nil {
		t.Error("/dev/null passes for KVM")
	}
}

func TestRequireNamesTheFeature(t *testing.T) {
	s, err := Open()
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) {
		// The ioctls themselves run wherever the device exists; package monitor's tests
		// need it and say so.
		t.Logf("no /dev/kvm here: %v", err)
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	err = s.Require(Feature{"time travel", 0xffff, "never"})
	if !errors.Is(err, ErrNotSupported) || err.Error() != "kvm: time travel (Linux never): not supported by this host's KVM" {
		t.Errorf("error %v", err)
	}
}
