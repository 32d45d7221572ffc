package volume

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/validation/partition"
)

// run runs a program: the cache's, or the host's.
func run(t testing.TB, stdin []byte, name string, args ...string) string {
	t.Helper()
	var cmd *exec.Cmd
	if root, err := debian.Open(); err == nil {
		cmd = root.Command(context.Background(), name, args...)
	}
	if cmd == nil || !exists(cmd.Path) {
		path := "/usr/sbin/" + name
		if !exists(path) {
			var err error
			if path, err = exec.LookPath(name); err != nil {
				t.Fatalf("%s is neither in the cache nor on this host: run `make fetch`", name)
			}
		}
		cmd = exec.CommandContext(context.Background(), path, args...)
		cmd.Env = os.Environ()
	}
	cmd.Env = append(cmd.Env, "MTOOLS_SKIP_CHECK=1", "TZ=UTC")
	cmd.Stdin = bytes.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return string(out)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// contents is what the test's file systems hold, by path.
func contents() map[string]string {
	all := map[string]string{
		"/EFI/BOOT/BOOTX64.EFI": strings.Repeat("loader", 20000), "/EFI/debian/grub.cfg": "set root", "/empty": "",
		"/A long name, with spaces and ümlauts.txt": "long", "/lower.txt": "lower", "/Mixed.Case": "mixed",
	}
	for i := range 70 {
		all[fmt.Sprintf("/many/file number %d", i)] = strings.Repeat("x", i*100)
	}
	return all
}

// fatImage makes a FAT file system with mtools.
func fatImage(t testing.TB, args ...string) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "fat.img")
	run(t, nil, "mformat", append([]string{"-C", "-i", image, "-v", "ESP"}, args...)...)
	made := map[string]bool{}
	for path, data := range contents() {
		for i, c := range path {
			if d := path[:i]; c == '/' && i > 0 && !made[d] {
				run(t, nil, "mmd", "-i", image, "::"+d)
				made[d] = true
			}
		}
		run(t, []byte(data), "mcopy", "-i", image, "-", "::"+path)
	}
	run(t, nil, "mattrib", "-i", image, "+r", "::/lower.txt")
	return image
}

func extImage(t testing.TB) string {
	t.Helper()
	dir, image := t.TempDir(), filepath.Join(t.TempDir(), "ext.img")
	for path, data := range contents() {
		file := filepath.Join(dir, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(data), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Symlink("EFI", filepath.Join(dir, "link")), os.Chmod(filepath.Join(dir, "lower.txt"), 0o444)); err != nil {
		t.Fatal(err)
	}
	run(t, nil, "mke2fs", "-q", "-F", "-t", "ext4", "-d", dir, image, "8M")
	return image
}

func load(t testing.TB, image string) []byte {
	t.Helper()
	b, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestVolumes reads the same files from each kind of file system, bare and in a partition.
func TestVolumes(t *testing.T) {
	for name, image := range map[string]func() string{
		"FAT12": func() string { return fatImage(t, "-T", "8192", "-h", "16", "-s", "32") },
		"FAT16": func() string { return fatImage(t, "-T", "65536", "-h", "16", "-s", "32") },
		"FAT32": func() string { return fatImage(t, "-T", "131072", "-h", "64", "-s", "32", "-F", "-c", "1") },
		"ext":   func() string { return extImage(t) },
	} {
		t.Run(name, func(t *testing.T) {
			b := load(t, image())
			v, err := Open(bytes.NewReader(b), int64(len(b)), Options{})
			if err != nil {
				t.Fatal(err)
			}
			if i := v.Info(); strings.HasPrefix(name, "FAT") && (i.Features[0] != name || i.Label != "ESP") {
				t.Errorf("%+v", i)
			}
			verify(t, v, b)
			disk := append(make([]byte, 1<<20), b...)
			disk[510], disk[511], disk[446+4] = 0x55, 0xaa, 0x83
			copy(disk[446+8:], []byte{0, 8, 0, 0, byte(len(b) / 512), byte(len(b) / 512 >> 8), byte(len(b) / 512 >> 16), 0})
			table, err := partition.Read(bytes.NewReader(disk), int64(len(disk)), partition.Options{})
			if err != nil || len(table.Partitions) != 1 {
				t.Fatalf("%+v, %v", table, err)
			}
			if v, err = OpenPartition(bytes.NewReader(disk), &table.Partitions[0], Options{}); err != nil {
				t.Fatal(err)
			}
			verify(t, v, b)
		})
	}
}

// verify holds a volume to the contents, and their extents to what is on the device.
func verify(t *testing.T, v Volume, device []byte) {
	t.Helper()
	want := contents()
	for e, err := range v.Walk() {
		if err != nil {
			t.Errorf("%s: %v", e.Path, err)
			continue
		}
		data, ok := want[e.Path]
		if e.Mode&unix.S_IFMT != unix.S_IFREG {
			if ok {
				t.Errorf("%s: mode %o", e.Path, e.Mode)
			}
			continue
		}
		delete(want, e.Path)
		if !ok || e.Size != int64(len(data)) || e.Mtime.Year() < 2020 || (e.FileMode().Perm()&0o200 == 0) != (e.Path == "/lower.txt") {
			t.Errorf("%+v", e)
			continue
		}
		r, err := e.Open()
		if err != nil {
			t.Errorf("%s: %v", e.Path, err)
			continue
		}
		h := sha256.New()
		if _, err := r.WriteTo(h); err != nil || [32]byte(h.Sum(nil)) != sha256.Sum256([]byte(data)) {
			t.Errorf("%s: contents differ, %v", e.Path, err)
		}
		p := make([]byte, 100)
		if n, err := r.ReadAt(p, e.Size/2); err != nil && !errors.Is(err, io.EOF) || string(p[:n]) != data[e.Size/2:min(int(e.Size/2)+100, len(data))] {
			t.Errorf("%s: %d bytes in the middle differ, %v", e.Path, n, err)
		}
		var from []byte
		for x, err := range e.Extents() {
			if err != nil {
				t.Errorf("%s: %v", e.Path, err)
			}
			if x.Logical >= 0 && x.Offset >= 0 {
				from = append(from, device[x.Offset:][:x.Length]...)
			}
		}
		if len(from) < len(data) || string(from[:len(data)]) != data {
			t.Errorf("%s: the extents hold %d bytes of something else", e.Path, len(from))
		}
	}
	if len(want) > 0 {
		t.Errorf("missing: %d, such as %.200v", len(want), want)
	}
	for err := range v.Check() {
		t.Errorf("check: %v", err)
	}
	verifyLookup(t, v)
}

func verifyLookup(t *testing.T, v Volume) {
	t.Helper()
	e, err := v.Lookup("EFI/debian/../BOOT", false)
	if err != nil {
		e, err = v.Lookup("EFI/BOOT", false) // FAT has no parents to go to
	}
	if err != nil || e.Path != "/EFI/BOOT" {
		t.Fatalf("%+v, %v", e, err)
	}
	count := 0
	for c, err := range v.ReadDir(e) {
		if err != nil || c.Path != "/EFI/BOOT/BOOTX64.EFI" {
			t.Errorf("%+v, %v", c, err)
		}
		count++
	}
	if count != 1 {
		t.Errorf("%d files", count)
	}
	if _, err := v.Lookup("/EFI/none", false); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v", err)
	}
	if v.Info().Kind == "ext" {
		if e, err := v.Lookup("/link/BOOT", true); err != nil || e.Path != "/EFI/BOOT" {
			t.Errorf("%+v, %v", e, err)
		}
	}
}

// TestRefused: what is not read is refused with the reason.
func TestRefused(t *testing.T) {
	b := make([]byte, 1<<20)
	copy(b, "XFSB")
	if _, err := Open(bytes.NewReader(b), int64(len(b)), Options{}); !errors.Is(err, partition.ErrRefused) || !strings.Contains(err.Error(), "XFS") {
		t.Errorf("%v", err)
	}
}
