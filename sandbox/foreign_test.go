package sandbox_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/lab/initramfs"
	"redoubt.dev/redoubt/qemu"
	"redoubt.dev/redoubt/sandbox"
)

// Users of nobody on the machine.
const (
	qemuID  = 0x52450010
	swtpmID = 0x52450011
)

// learn lets calls outside the lists pass and prints them: how the lists are made.
func learn() bool { return os.Getenv("REDOUBT_SANDBOX_LEARN") != "" }

func tools(t *testing.T) *debian.Root {
	t.Helper()
	r, err := debian.Open()
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// foreign prepares a program of the unpacked packages.
func foreign(t *testing.T, r *debian.Root, s *sandbox.Spec, name string, args []string, files []*os.File, more ...string) (*running, *bytes.Buffer) {
	t.Helper()
	libraries := []string{
		r.Path("usr/lib/x86_64-linux-gnu"), r.Path("lib/x86_64-linux-gnu"), r.Path("usr/lib/x86_64-linux-gnu/swtpm"),
	}
	cmd := exec.Command(r.Path("usr/bin/"+name), args...)
	cmd.Env = []string{"LC_ALL=C", "LD_LIBRARY_PATH=" + strings.Join(libraries, ":")}
	cmd.ExtraFiles = files
	out := &bytes.Buffer{}
	cmd.Stdout, cmd.Stderr = out, out
	root, err := sandbox.ProgramRoot(cmd.Path, libraries, more...)
	if err != nil {
		t.Fatal(err)
	}
	s.Name, s.Root, s.Learn = name, append(root, s.Root...), learn()
	if s.Policy, err = sandbox.BasePolicy(strings.TrimSuffix(name, "-system-x86_64")); err != nil {
		t.Fatal(err)
	}
	g, err := (&sandbox.Host{Launcher: launcher(t)}).Prepare(cmd, s)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Start(); err != nil {
		t.Fatal(err)
	}
	p := &running{g, sync.OnceValue(g.Wait)}
	t.Cleanup(func() {
		_ = g.Signal(unix.SIGKILL)
		_ = p.wait()
	})
	state, err := sandbox.Observe(g.PID())
	if err != nil {
		t.Fatalf("%v: %v", err, out.String())
	}
	for _, d := range s.Declared().Differences(state) {
		t.Errorf("%s: %s", name, d)
	}
	return p, out
}

// running is a process that is waited for once.
type running struct {
	*sandbox.Guard
	wait func() error
}

func launcher(t *testing.T) string {
	t.Helper()
	if bin := os.Getenv("REDOUBT_TEST_PROBE"); bin != "" {
		return bin
	}
	bin := filepath.Join(t.TempDir(), "probe")
	cmd := exec.Command("go", "build", "-o", bin, "./attack/probe")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return bin
}

func report(t *testing.T, g *running) {
	t.Helper()
	if l := g.Learned(); len(l) > 0 {
		for k, n := range l {
			t.Logf("learned: %s (%d)", k, n)
		}
	}
}

func pair(t *testing.T) (own, theirs *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil { // for deadlines
		t.Fatal(err)
	}
	own, theirs = os.NewFile(uintptr(fds[0]), "own"), os.NewFile(uintptr(fds[1]), "theirs")
	t.Cleanup(func() { own.Close(); theirs.Close() })
	return own, theirs
}

func memfd(t *testing.T, name string, data []byte, size int64) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), name)
	t.Cleanup(func() { f.Close() })
	if _, err := f.WriteAt(data, 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(max(size, int64(len(data)))); err != nil {
		t.Fatal(err)
	}
	return f
}

// stateDir is a directory for a TPM's state, of its user.
func stateDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chown(dir, swtpmID, swtpmID); err != nil {
		t.Fatal(err)
	}
	return dir
}

// startSwtpm starts swtpm in its sandbox as the product starts it: control channel and key by
// descriptor. It returns our end of the control channel.
func startSwtpm(t *testing.T, r *debian.Root, dir string) (*running, *os.File, *bytes.Buffer) {
	t.Helper()
	own, theirs := pair(t)
	key, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer key.Close()
	if _, err := w.Write(bytes.Repeat([]byte{7}, 32)); err != nil {
		t.Fatal(err)
	}
	w.Close()
	g, out := foreign(t, r, &sandbox.Spec{
		UID: swtpmID, GID: swtpmID, Memory: 64 << 20,
		Root: []sandbox.Bind{
			{Source: dir, Target: "/state", Writable: true, NoExec: true},
			{Source: "/dev/urandom", Device: true},
			{Source: "/dev/null", Device: true, Writable: true},
		},
	}, "swtpm", []string{
		"socket", "--tpm2", "--terminate", "--seccomp", "action=none", "--tpmstate", "dir=/state,mode=0600", "--ctrl", "type=unixio,clientfd=3",
		"--key", "fd=4,mode=aes-256-cbc,format=binary", "--locality", "reject-locality-4,allow-set-locality",
	}, []*os.File{theirs, key})
	theirs.Close()
	return g, own, out
}

// control makes a call of the control channel with a descriptor (or -1).
func control(t *testing.T, c *os.File, fd int, words ...uint32) {
	t.Helper()
	var b []byte
	for _, w := range words {
		b = binary.BigEndian.AppendUint32(b, w)
	}
	var rights []byte
	if fd >= 0 {
		rights = unix.UnixRights(fd)
	}
	if err := unix.Sendmsg(int(c.Fd()), b, rights, nil, 0); err != nil {
		t.Fatal(err)
	}
	var res [4]byte
	if _, err := io.ReadFull(c, res[:]); err != nil {
		t.Fatalf("swtpm's answer to %d: %v", words[0], err)
	}
	if r := binary.BigEndian.Uint32(res[:]); r != 0 {
		t.Fatalf("swtpm's answer to %d: %#x", words[0], r)
	}
}

// tpm is a transport of go-tpm.
type tpm struct{ f *os.File }

func (d tpm) Send(cmd []byte) ([]byte, error) {
	for range 20 {
		if _, err := d.f.Write(cmd); err != nil {
			return nil, err
		}
		b := make([]byte, 8192)
		if _, err := io.ReadFull(d.f, b[:10]); err != nil {
			return nil, err
		}
		n := int(binary.BigEndian.Uint32(b[2:]))
		if n < 10 || n > len(b) {
			return nil, errors.New("bad length")
		}
		if _, err := io.ReadFull(d.f, b[10:n]); err != nil {
			return nil, err
		}
		if binary.BigEndian.Uint32(b[6:]) != uint32(tpm2.TPMRCRetry) {
			return b[:n], nil
		}
	}
	return nil, errors.New("TPM_RC_RETRY without end")
}

// swtpm makes keys, quotes, keeps its state and finds it again, all within its list.
func TestSwtpm(t *testing.T) {
	r := tools(t)
	dir := stateDir(t)
	for start := range 2 {
		g, ctl, out := startSwtpm(t, r, dir)
		data, theirData := pair(t)
		control(t, ctl, int(theirData.Fd()), 0x10) // SET_DATAFD
		theirData.Close()
		control(t, ctl, -1, 2, 0) // INIT
		d := tpm{data}
		if _, err := (tpm2.Startup{StartupType: tpm2.TPMSUClear}).Execute(d); err != nil {
			t.Fatal(err)
		}
		if start == 0 {
			quote(t, d)
		} else if _, err := (tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(0x01800001)}).Execute(d); err != nil {
			t.Errorf("state is lost: %v", err)
		}
		if _, err := (tpm2.Shutdown{ShutdownType: tpm2.TPMSUClear}).Execute(d); err != nil {
			t.Fatal(err)
		}
		control(t, ctl, -1, 3) // SHUTDOWN
		if err := g.wait(); err != nil {
			t.Errorf("%v: %s", err, out.String())
		}
		report(t, g)
	}
}

func quote(t *testing.T, d tpm) {
	t.Helper()
	for _, template := range []tpm2.TPMTPublic{tpm2.RSAEKTemplate, tpm2.ECCEKTemplate} {
		ek, err := (tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHEndorsement, InPublic: tpm2.New2B(template)}).Execute(d)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := (tpm2.FlushContext{FlushHandle: ek.ObjectHandle}).Execute(d); err != nil {
			t.Fatal(err)
		}
	}
	ak := tpm2.ECCSRKTemplate
	ak.ObjectAttributes.Decrypt, ak.ObjectAttributes.SignEncrypt = false, true
	ak.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
		Scheme: tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgECDSA, Details: tpm2.NewTPMUAsymScheme(
			tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256})},
		CurveID: tpm2.TPMECCNistP256,
	})
	key, err := (tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(ak)}).Execute(d)
	if err != nil {
		t.Fatal(err)
	}
	_, err = (tpm2.Quote{
		SignHandle:     tpm2.NamedHandle{Handle: key.ObjectHandle, Name: key.Name},
		QualifyingData: tpm2.TPM2BData{Buffer: []byte("nonce")},
		PCRSelect: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{
			{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(0, 1)},
		}},
	}).Execute(d)
	if err != nil {
		t.Fatal(err)
	}
	_, err = (tpm2.NVDefineSpace{
		AuthHandle: tpm2.TPMRHOwner,
		PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{
			NVIndex: 0x01800001, NameAlg: tpm2.TPMAlgSHA256, DataSize: 8,
			Attributes: tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, AuthRead: true},
		}),
	}).Execute(d)
	if err != nil {
		t.Fatal(err)
	}
}

// QEMU as process 1 of its namespace obeys SIGTERM, by which it is stopped.
func TestQEMUTerminates(t *testing.T) {
	r := tools(t)
	qmp, theirQMP := pair(t)
	args, err := qemu.Args(qemu.Config{
		Name: "idle", Memory: 64 << 20, CPUs: 1, Firmware: qemu.SeaBIOS, TPM: qemu.NoTPM,
	}, qemu.FDs{RAM: 3, QMP: 4}, r.Path("usr/share/qemu"), r.Path("usr/share/seabios"))
	if err != nil {
		t.Fatal(err)
	}
	g, out := foreign(t, r, &sandbox.Spec{
		UID: qemuID, GID: qemuID, Proc: true, Memory: 1 << 30,
		Root: []sandbox.Bind{{Source: "/dev/null", Device: true, Writable: true}},
	}, "qemu-system-x86_64", args, []*os.File{memfd(t, "ram", nil, 64<<20), theirQMP},
		r.Path("usr/share/qemu"), r.Path("usr/share/seabios"), r.Path("usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so"))
	theirQMP.Close()
	// The answer to a command comes from its main loop, when it has its handlers: a SIGTERM before
	// that does nothing to process 1.
	if _, err := qmp.WriteString(`{"execute":"qmp_capabilities"}`); err != nil {
		t.Fatal(err)
	}
	if err := qmp.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	answers := bufio.NewReader(qmp)
	for line := ""; !strings.Contains(line, `"return"`); {
		if line, err = answers.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
	}
	if err := g.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := g.wait(); err != nil {
		t.Errorf("%v: %s", err, out.String())
	}
	report(t, g)
}

const initScript = `#!/bin/sh
/bin/busybox --install -s /bin
mount -t proc p /proc
mount -t sysfs s /sys
echo "GUEST UP $(cat /sys/class/tpm/tpm0/pcr-sha256/10)"
poweroff -f
`

// QEMU boots a kernel to its init with a TPM, both in their sandboxes and within their lists.
func TestQEMU(t *testing.T) {
	r := tools(t)
	tpmGuard, tpmControl, tpmOut := startSwtpm(t, r, stateDir(t))

	vmlinuz, err := r.Vmlinuz(debian.Usual)
	if err != nil {
		t.Fatal(err)
	}
	kernel, err := os.ReadFile(vmlinuz)
	if err != nil {
		t.Fatal(err)
	}
	b := initramfs.New(r.Path("bin/busybox"), initScript)
	initrd, err := b.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	const memory = 256 << 20
	console, theirConsole := pair(t)
	qmp, theirQMP := pair(t)
	disk := memfd(t, "disk", nil, 1<<20)
	files := []*os.File{
		memfd(t, "ram", nil, memory), memfd(t, "kernel", kernel, 0), memfd(t, "initrd", initrd, 0),
		theirConsole, theirQMP, tpmControl, disk,
	}
	args, err := qemu.Args(qemu.Config{
		Name: "sandboxed", Memory: memory, CPUs: 2, CommandLine: debian.Cmdline + " panic=-1",
	}, qemu.FDs{RAM: 3, Kernel: 4, Initrd: 5, Console: 6, QMP: 7, TPM: 8, Disks: []qemu.DiskFD{{FD: 9}}},
		r.Path("usr/share/qemu"), r.Path("usr/share/seabios"))
	if err != nil {
		t.Fatal(err)
	}
	g, out := foreign(t, r, &sandbox.Spec{
		UID: qemuID, GID: qemuID, Proc: true, Memory: 2 << 30,
		Root: []sandbox.Bind{{Source: "/dev/null", Device: true, Writable: true}},
	}, "qemu-system-x86_64", args, files, r.Path("usr/share/qemu"), r.Path("usr/share/seabios"),
		r.Path("usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so"))
	for _, f := range []*os.File{theirConsole, theirQMP, tpmControl} {
		f.Close()
	}
	if _, err := qmp.WriteString(`{"execute":"qmp_capabilities"}` + "\n" + `{"execute":"query-status"}` + "\n"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { console.Close() })
	defer stop()
	text, _ := io.ReadAll(console) // ends with QEMU
	err = g.wait()
	report(t, g)
	if err != nil || !strings.Contains(string(text), "GUEST UP ") {
		t.Errorf("QEMU: %v: %s\nconsole: %s", err, out.String(), text)
	}
	if strings.Contains(string(text), strings.Repeat("0", 64)) {
		t.Errorf("IMA had no TPM: %s", text)
	}
	answers, _ := io.ReadAll(qmp)
	if !bytes.Contains(answers, []byte(`"status"`)) {
		t.Errorf("QMP: %s", answers)
	}
	if err := tpmGuard.wait(); err != nil {
		t.Errorf("swtpm: %v: %s", err, tpmOut.String())
	}
	report(t, tpmGuard)
}
