package cli

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"redoubt.dev/redoubt/block"
)

// tiny is the smallest file system that is read: an ext2 of one directory, one file and one link, laid out by hand.
func tiny() []byte {
	const (
		bs     = 1024
		table  = 5
		inodes = 16
	)
	b := make([]byte, 64*bs)
	le := binary.LittleEndian
	super := b[1024:]
	for at, v := range map[int]uint32{0: inodes, 4: 64, 0x14: 1, 0x20: 8192, 0x24: 8192, 0x28: inodes, 0x4c: 1, 0x54: 11, 0x60: 2} {
		le.PutUint32(super[at:], v)
	}
	le.PutUint16(super[0x38:], 0xef53)
	le.PutUint16(super[0x58:], 128)
	copy(super[0x78:], "tiny")
	for i, v := range []uint32{3, 4, table} {
		le.PutUint32(b[2*bs+4*i:], v)
	}
	for i := range 64 {
		b[3*bs+i/8] |= 1 << (i % 8)
	}
	inode := func(n int, mode uint16, size uint32, links uint16, blocks uint32, block uint32) []byte {
		p := b[table*bs+(n-1)*128:]
		b[4*bs+(n-1)/8] |= 1 << ((n - 1) % 8)
		le.PutUint16(p, mode)
		le.PutUint32(p[4:], size)
		le.PutUint16(p[0x1a:], links)
		le.PutUint32(p[0x1c:], blocks)
		le.PutUint32(p[0x28:], block)
		return p
	}
	inode(2, 0o40755, bs, 2, 2, 8)
	inode(11, 0o100644, 5, 1, 2, 9)
	copy(inode(12, 0o120777, 4, 1, 0, 0)[0x28:], "file")
	copy(b[9*bs:], "hello")
	at := 8 * bs
	for i, e := range []struct {
		n    uint32
		kind byte
		name string
	}{{2, 2, "."}, {2, 2, ".."}, {11, 1, "file"}, {12, 7, "link"}} {
		length := 12
		if i == 3 {
			length = 9*bs - at
		}
		le.PutUint32(b[at:], e.n)
		le.PutUint16(b[at+4:], uint16(length))
		b[at+6], b[at+7] = byte(len(e.name)), e.kind
		copy(b[at+8:], e.name)
		at += length
	}
	return b
}

// imageRun runs an image command and returns what it says.
func imageRun(t *testing.T, asJSON bool, args ...string) (string, error) {
	t.Helper()
	var out, errs bytes.Buffer
	a := &app{out: &out, err: &errs, json: asJSON}
	c := a.imageCommand()
	c.SilenceErrors, c.SilenceUsage = true, true
	c.SetArgs(args)
	err := c.Execute()
	if errs.Len() > 0 {
		err = errors.Join(err, errors.New(errs.String()))
	}
	return out.String(), err
}

func TestImage(t *testing.T) {
	dir := t.TempDir()
	bare, disk := filepath.Join(dir, "bare.img"), filepath.Join(dir, "disk:1")
	whole := append(make([]byte, 1<<20), tiny()...)
	whole[510], whole[511], whole[446+4] = 0x55, 0xaa, 0x83
	binary.LittleEndian.PutUint32(whole[446+8:], 2048)
	binary.LittleEndian.PutUint32(whole[446+12:], 128)
	if err := errors.Join(os.WriteFile(bare, tiny(), 0o600), os.WriteFile(disk, whole, 0o600)); err != nil {
		t.Fatal(err)
	}
	hash := fmt.Sprintf("%x  /file\n", sha256.Sum256([]byte("hello")))
	for _, c := range []struct {
		args string
		want string // the beginning, or a part
	}{
		{"cat BARE /link", "hello"},
		{"cat DISK:1 /file", "hello"},
		{"hash BARE /", hash},
		{"hash DISK link", hash},
		{"ls BARE", "file             0644     0:0                5 1970-01-01 00:00:00 file\nlink "},
		{"ls -r BARE", "/link -> file"},
		{"stat BARE /link", "target   file"},
		{"stat BARE /file", "extent   data              1024 bytes at 9216, of the file from 0"},
		{"stat DISK:1", "label       tiny"},
		{"check DISK:1", "nothing found"},
	} {
		args := strings.Fields(strings.NewReplacer("BARE", bare, "DISK", disk).Replace(c.args))
		out, err := imageRun(t, false, args...)
		if err != nil || !strings.Contains(out, c.want) {
			t.Errorf("%s: %v: %s", c.args, err, out)
		}
		if args[0] == "cat" {
			continue
		}
		var v any
		if out, err = imageRun(t, true, args...); err != nil || json.Unmarshal([]byte(out), &v) != nil {
			t.Errorf("--json %s: %v: %s", c.args, err, out)
		}
	}
}

// TestImageErrors: each error names the image, what is wrong and, where there is one, the mend.
func TestImageErrors(t *testing.T) {
	dir := t.TempDir()
	bare, empty := filepath.Join(dir, "bare.img"), filepath.Join(dir, "empty.img")
	broken := tiny()
	broken[5*1024+10*128+0x28+3] = 1 // a block far away
	damaged := filepath.Join(dir, "damaged.img")
	if err := errors.Join(os.WriteFile(bare, tiny(), 0o600), os.WriteFile(empty, make([]byte, 1<<20), 0o600), os.WriteFile(damaged, broken, 0o600)); err != nil {
		t.Fatal(err)
	}
	over := filepath.Join(dir, "over.img")
	if _, err := block.CreateOverlay(over, bare); err != nil {
		t.Fatal(err)
	}
	for args, want := range map[string]string{
		"ls " + filepath.Join(dir, "none"): "no such file",
		"ls " + empty:                      "no partition table and no file system",
		"ls " + bare + ":3":                "no partition 3",
		"cat " + bare + " /none":           "/none: file does not exist",
		"cat " + bare + " /":               "only files have contents",
		"cat " + damaged + " /file":        "inode 11: block 0 of it at",
		"check " + damaged:                 "exit status 1",
		"hash " + damaged:                  "/file: inode 11",
		"ls " + over:                       "name the image that it is over with --base",
		"cat " + bare:                      "give IMAGE[:partition] and a path",
	} {
		if out, err := imageRun(t, false, strings.Fields(args)...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v: %s", args, err, out)
		}
	}
	if out, err := imageRun(t, false, "cat", "--base", bare, over, "/file"); err != nil || out != "hello" {
		t.Errorf("overlay: %q, %v", out, err)
	}
	held, err := block.Open(bare, false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := imageRun(t, false, "ls", bare); err == nil || !strings.Contains(err.Error(), "stop the guest first") {
		t.Errorf("in use: %v", err)
	}
	if err := held.Close(); err != nil {
		t.Error(err)
	}
}
