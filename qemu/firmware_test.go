package qemu

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"redoubt.dev/redoubt/lab/bootdisk"
	"redoubt.dev/redoubt/lab/debian"
)

// firmwareLimit: SeaBIOS and OVMF take their time under emulation.
const firmwareLimit = 150 * time.Second

// bootDisk makes an image that boots both ways.
func bootDisk(t testing.TB, r *debian.Root) *os.File {
	t.Helper()
	dir := t.TempDir()
	kernel, err := r.Vmlinuz(debian.Usual)
	if err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(dir, "initrd")
	if err := os.WriteFile(image, initrd(t, r), 0o600); err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(dir, "disk.img")
	if err := bootdisk.Make(t.Context(), r, disk, dir, kernel, image, debian.Cmdline+" panic=-1 do=firmware"); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(disk, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// firmware boots the disk through firmware and gives what the guest printed.
func firmware(t *testing.T, kind Firmware) (log []byte, out string) {
	t.Helper()
	r := root(t)
	con, theirs := newConsole(t)
	files := Files{Console: theirs, Disks: []Disk{{File: bootDisk(t, r)}}}
	if kind == OVMF {
		vars, err := NewVars()
		if err != nil {
			t.Fatal(err)
		}
		files.Vars = tempFile(t, "vars", vars)
	}
	m := New(Config{Name: "fw", Memory: 512 << 20, CPUs: 1, Firmware: kind}, Hooks{})
	begin := time.Now()
	startMachine(t, m, files, newSwtpm(t, r))
	con.wait("LOGBEGIN", firmwareLimit)
	t.Logf("%s to init: %v", kind, time.Since(begin))
	con.wait("LOGEND", bootLimit)
	area, err := m.ReadEventLog()
	if kind == SeaBIOS && err != nil {
		t.Error(err)
	}
	if kind == OVMF && !errors.Is(err, errNoLogArea) {
		t.Errorf("OVMF keeps its log elsewhere; found %d bytes, %v", len(area), err)
	}
	wantOutcome(t, m, con, PowerOff)
	return area, con.String()
}

var (
	printedLog = regexp.MustCompile(`LOGBEGIN\r?\n([0-9a-f]*)\r?\n`)
	printedPCR = regexp.MustCompile(`PCR (\d+) ([0-9A-F]{64})`)
)

// checkFirmware compares the PCRs that the guest printed with a replay of its log, and returns
// the log.
func checkFirmware(t *testing.T, out string) (log []byte) {
	t.Helper()
	if dir := os.Getenv("REDOUBT_SAVE"); dir != "" { // to look at a failure
		if err := os.WriteFile(filepath.Join(dir, t.Name()), []byte(out), 0o600); err != nil {
			t.Error(err)
		}
	}
	m := printedLog.FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("no event log from the guest:\n%s", out)
	}
	log, err := hex.DecodeString(m[1])
	if err != nil {
		t.Fatal(err)
	}
	replayed := replaySHA256(t, log)
	pcrs := printedPCR.FindAllStringSubmatch(out, -1)
	if len(pcrs) != 10 {
		t.Fatalf("%d PCRs from the guest:\n%s", len(pcrs), out)
	}
	for _, p := range pcrs {
		want := strings.ToUpper(hex.EncodeToString(replayed[p[1]]))
		if want == "" {
			want = strings.Repeat("0", 64)
		}
		if p[2] != want {
			t.Errorf("PCR %s is %s, its log says %s", p[1], p[2], want)
		}
	}
	if replayed["4"] == nil {
		t.Error("the firmware measured no boot loader")
	}
	return log
}

// replaySHA256 is a short reader of well-formed crypto-agile logs (TCG PFP 1.05 §10.2).
func replaySHA256(t *testing.T, log []byte) map[string][]byte {
	t.Helper()
	next := func(n uint32) []byte {
		if uint64(n) > uint64(len(log)) {
			t.Fatalf("log ends %d bytes early", int(n)-len(log))
		}
		b := log[:n]
		log = log[n:]
		return b
	}
	u16 := func() uint16 { return binary.LittleEndian.Uint16(next(2)) }
	u32 := func() uint32 { return binary.LittleEndian.Uint32(next(4)) }
	next(28) // the header event
	next(u32())
	sizes := map[uint16]uint32{4: 20, 0xb: 32, 0xc: 48, 0xd: 64, 0x12: 32}
	pcrs := map[string][]byte{}
	for len(log) > 0 {
		pcr, kind := strconv.Itoa(int(u32())), u32()
		for range u32() {
			alg := u16()
			sum := next(sizes[alg])
			if alg != 0xb || kind == 3 { // EV_NO_ACTION extends nothing
				continue
			}
			if pcrs[pcr] == nil {
				pcrs[pcr] = make([]byte, 32)
			}
			h := sha256.Sum256(append(pcrs[pcr], sum...))
			pcrs[pcr] = h[:]
		}
		next(u32())
	}
	return pcrs
}

// SeaBIOS initialises the TPM, measures, and leaves its log where the host finds it.
func TestSeaBIOS(t *testing.T) {
	area, out := firmware(t, SeaBIOS)
	log := checkFirmware(t, out)
	if !bytes.HasPrefix(area, log) {
		t.Errorf("the host's view of the log differs from the guest's:\n%.200x\n%.200x", area, log)
	}
}

// OVMF initialises the TPM and measures; its log comes through UEFI.
func TestOVMF(t *testing.T) {
	_, out := firmware(t, OVMF)
	checkFirmware(t, out)
}

// The firmware's TPM menu is reachable from the console.
func TestTPMMenu(t *testing.T) {
	r := root(t)
	own, theirs := socketpair(t)
	con := readConsole(t, own)
	m := New(Config{Name: "menu", Memory: 128 << 20, CPUs: 1, Firmware: SeaBIOS, BootMenu: 30 * time.Second}, Hooks{})
	startMachine(t, m, Files{Console: theirs}, newSwtpm(t, r))
	con.wait("Press ESC for boot menu", bootLimit)
	if _, err := own.Write([]byte{0x1b}); err != nil {
		t.Fatal(err)
	}
	con.wait("TPM Configuration", bootLimit)
	if _, err := own.Write([]byte("t")); err != nil {
		t.Fatal(err)
	}
	con.wait("Clear TPM", bootLimit)
	if err := m.Quit(); err != nil {
		t.Fatal(err)
	}
	wantOutcome(t, m, con, Stopped)
}
