package eventlog

import (
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"slices"
	"sync"
	"unicode/utf16"

	"github.com/google/go-tpm/tpm2"
)

// Banks are the algorithms Measure knows: the banks that libtpms allocates by default.
var Banks = [...]tpm2.TPMAlgID{tpm2.TPMAlgSHA1, tpm2.TPMAlgSHA256, tpm2.TPMAlgSHA384, tpm2.TPMAlgSHA512}

// ParseBanks gives the banks, of [Banks], that have the names; SHA-256 alone where there is no name.
func ParseBanks[S ~string](names []S) ([]tpm2.TPMAlgID, error) {
	if len(names) == 0 {
		return []tpm2.TPMAlgID{tpm2.TPMAlgSHA256}, nil
	}
	var out []tpm2.TPMAlgID
	for _, name := range names {
		i := slices.IndexFunc(Banks[:], func(id tpm2.TPMAlgID) bool { return hashes[id].name == string(name) })
		if i < 0 {
			return nil, fmt.Errorf("%q is no PCR bank: use sha1, sha256, sha384 or sha512", name)
		}
		out = append(out, Banks[i])
	}
	return out, nil
}

// Cap is what an event puts into a bank it was not hashed for: the digest of the separator that
// says that an error occurred (PFP 1.05 §10.4.1), nil for a bank that is not of [Banks].
// A register that has it can no longer be given the value of any measured boot.
func Cap(bank tpm2.TPMAlgID) []byte {
	if !slices.Contains(Banks[:], bank) {
		return nil
	}
	h := hashes[bank].new()
	h.Write([]byte{1, 0, 0, 0})
	return h.Sum(nil)
}

// block is what is read at once: large enough that handing it over costs nothing beside
// hashing it, small enough to stay in a processor's cache.
const block = 256 << 10

// Measure makes the event whose digests are those of content, read once to its end and hashed
// for all the banks, of [Banks], at the same time; nil stands for all of them. Where content is
// nil the digests are those of data.
//
// A content that is an *os.File is read from its start and its offset is left alone, so that
// the descriptor can be shared.
func Measure(banks []tpm2.TPMAlgID, pcr, typ uint32, data []byte, content io.Reader) (Event, error) {
	e := Event{PCR: pcr, Type: typ, Data: data}
	if banks == nil {
		banks = Banks[:]
	}
	sums := make([]hash.Hash, len(banks))
	for i, id := range banks {
		h := hashes[id]
		if h.new == nil {
			return Event{}, fmt.Errorf("measure %q into PCR %d: no bank of %s: banks are sha1, sha256, sha384, sha512", data, pcr, AlgorithmName(id))
		}
		sums[i] = h.new()
	}
	if content == nil {
		for _, s := range sums {
			s.Write(data)
		}
	} else if err := hashAll(sums, content); err != nil {
		return Event{}, fmt.Errorf("measure %q into PCR %d: %w", data, pcr, err)
	}
	for i, id := range banks {
		e.Digests = append(e.Digests, Digest{id, sums[i].Sum(nil)})
	}
	return e, nil
}

// hashAll feeds r to every hash, each in a goroutine of its own that ends before hashAll
// returns. Two blocks alternate: while one is hashed the next is read.
func hashAll(sums []hash.Hash, r io.Reader) error {
	if f, ok := r.(*os.File); ok {
		st, err := f.Stat()
		if err != nil {
			return err
		}
		if st.Mode().IsRegular() {
			r = io.NewSectionReader(f, 0, st.Size())
		}
	}
	type job struct {
		b    []byte
		done *sync.WaitGroup
	}
	var all sync.WaitGroup
	work := make([]chan job, len(sums))
	for i, s := range sums {
		c := make(chan job, 2)
		work[i] = c
		all.Go(func() {
			for j := range c {
				s.Write(j.b)
				j.done.Done()
			}
		})
	}
	defer all.Wait()
	defer func() {
		for _, c := range work {
			close(c)
		}
	}()

	var buf [2][]byte
	var busy [2]sync.WaitGroup
	for i := 0; ; i ^= 1 {
		busy[i].Wait()
		if buf[i] == nil {
			buf[i] = make([]byte, block)
		}
		n, err := io.ReadFull(r, buf[i])
		busy[i].Add(len(work))
		for _, c := range work {
			c <- job{buf[i][:n], &busy[i]}
		}
		switch {
		case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
			return nil
		case err != nil:
			return err
		}
	}
}

// Data of the events of a measured boot.
const (
	KernelData    = "kernel"
	InitrdData    = "initrd"
	FirmwareData  = "firmware"
	CmdlinePrefix = "kernel_cmdline: " // as GRUB writes it; the digest is that of what follows
)

// Registers of a measured boot.
const (
	PCRMonitor  uint32 = 0  // monitor version
	PCRMachine  uint32 = 1  // machine configuration
	PCRKernel   uint32 = 4  // kernel image
	PCRCmdline  uint32 = 8  // kernel command line
	PCRInitrd   uint32 = 9  // initial RAM file system
	PCRIMA      uint32 = 10 // Linux IMA extends it while the guest runs
	PCRFirmware uint32 = 13 // all of it, for a guest that brings firmware
)

// A BootConfig is what the host hands to a guest that it boots by kernel.
type BootConfig struct {
	MonitorVersion string
	MachineConfig  []byte          // the machine as built, in one canonical form
	Kernel         io.Reader       // as [Measure] reads it; required
	Initrd         io.Reader       // nil: none
	Cmdline        string          // exactly as the kernel gets it, without the NUL
	Banks          []tpm2.TPMAlgID // as in [Measure]
}

// Boot measures what a guest starts from. The events are always the same for the same guest:
// monitor version (PCR 0), machine configuration (1), kernel (4), command line (8), initrd (9,
// where there is one), and the separators of PCRs 0 to 7, which end the host's part
// (PFP 1.05 §3.3.4, §10.4.1).
func Boot(c BootConfig) ([]Event, error) {
	if missing(c.Kernel) {
		return nil, errors.New("measure the boot: there is no kernel: give one")
	}
	cmdline, err := Measure(c.Banks, PCRCmdline, TypeIPL, []byte(c.Cmdline), nil)
	if err != nil {
		return nil, err
	}
	cmdline.Data = []byte(CmdlinePrefix + c.Cmdline)
	events, err := host(c.Banks, c.MonitorVersion, c.MachineConfig, PCRMonitor, PCRMachine)
	if err != nil {
		return nil, err
	}
	kernel, err := Measure(c.Banks, PCRKernel, TypeIPL, []byte(KernelData), c.Kernel)
	if err != nil {
		return nil, err
	}
	events = append(events, kernel, cmdline)
	if !missing(c.Initrd) {
		initrd, err := Measure(c.Banks, PCRInitrd, TypeIPL, []byte(InitrdData), c.Initrd)
		if err != nil {
			return nil, err
		}
		events = append(events, initrd)
	}
	for pcr := range uint32(8) {
		sep, err := Measure(c.Banks, pcr, TypeSeparator, make([]byte, 4), nil)
		if err != nil {
			return nil, err
		}
		events = append(events, sep)
	}
	return events, nil
}

// A FirmwareConfig is what the host hands to a guest that boots through firmware of its own.
type FirmwareConfig struct {
	MonitorVersion string
	MachineConfig  []byte
	Firmware       io.Reader // the image, as [Measure] reads it; required
	Banks          []tpm2.TPMAlgID
}

// BootFirmware measures what such a guest starts from: monitor version, machine configuration
// and firmware image, all into PCR 13. PCRs 0 to 7 belong to the firmware, which keeps a log
// of its own and writes their separators; 8 to 12 and 14 are taken by common boot loaders and
// the kernel. The host keeps this log: the guest's firmware starts its own from nothing.
func BootFirmware(c FirmwareConfig) ([]Event, error) {
	if missing(c.Firmware) {
		return nil, errors.New("measure the boot: there is no firmware: give one")
	}
	events, err := host(c.Banks, c.MonitorVersion, c.MachineConfig, PCRFirmware, PCRFirmware)
	if err != nil {
		return nil, err
	}
	firmware, err := Measure(c.Banks, PCRFirmware, TypeIPL, []byte(FirmwareData), c.Firmware)
	if err != nil {
		return nil, err
	}
	return append(events, firmware), nil
}

// host measures what every guest has.
func host(banks []tpm2.TPMAlgID, version string, machine []byte, versionPCR, machinePCR uint32) ([]Event, error) {
	v, err := Measure(banks, versionPCR, TypeSCRTMVersion, VersionData(version), nil)
	if err != nil {
		return nil, err
	}
	m, err := Measure(banks, machinePCR, TypePlatformFlags, machine, nil)
	if err != nil {
		return nil, err
	}
	return []Event{v, m}, nil
}

// VersionData is a version as an EV_S_CRTM_VERSION event holds it: UTF-16, little-endian,
// with its NUL (PFP 1.05 §10.4.1).
func VersionData(version string) []byte {
	var out []byte
	for _, u := range utf16.Encode([]rune(version + "\x00")) {
		out = append(out, byte(u), byte(u>>8))
	}
	return out
}

// missing reports whether r is nil or a nil *os.File.
func missing(r io.Reader) bool {
	f, isFile := r.(*os.File)
	return r == nil || isFile && f == nil
}
