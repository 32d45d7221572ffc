package partition

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"redoubt.dev/redoubt/lab/debian"
)

// sfdisk runs the program of util-linux: the cache's, or the host's.
func sfdisk(t testing.TB, input string, args ...string) []byte {
	t.Helper()
	var cmd *exec.Cmd
	if root, err := debian.Open(); err == nil {
		cmd = root.Command(t.Context(), "sfdisk", args...)
	}
	if cmd == nil || !exists(cmd.Path) {
		path := "/usr/sbin/sfdisk"
		if !exists(path) {
			var err error
			if path, err = exec.LookPath("sfdisk"); err != nil {
				t.Fatal("sfdisk (Debian: fdisk) is neither in the cache nor on this host: run `make fetch`")
			}
		}
		cmd = exec.CommandContext(t.Context(), path, args...)
	}
	cmd.Stdin = strings.NewReader(input)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("sfdisk %v: %v: %s", args, err, errs.String())
	}
	return out
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// makeDisk makes an image with a table and returns it whole.
func makeDisk(t testing.TB, script string) (path string, b []byte) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 32<<20); err != nil {
		t.Fatal(err)
	}
	sfdisk(t, script, "-q", "--no-reread", "--no-tell-kernel", path)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return path, b
}

var scripts = map[string]string{
	"gpt":      "label: gpt\nstart=2048, size=4096, type=U, name=\"EFI ünit\"\nstart=8192, size=20000\nstart=40000, size=1",
	"gpt-one":  "label: gpt\n,\n",
	"mbr":      "label: dos\nstart=2048, size=4096, type=c, bootable\nstart=8192, size=20000, type=83",
	"extended": "label: dos\nstart=2048, size=4096, type=83\nstart=8192, size=50000, type=5\nstart=10240, size=2048, type=83\nstart=14336, size=2048, type=82\nstart=20480, size=4096, type=8e\n",
}

// TestTables holds tables to what sfdisk says of them.
func TestTables(t *testing.T) {
	for name, script := range scripts {
		path, b := makeDisk(t, script)
		var want struct {
			Table struct {
				Label      string `json:"label"`
				Partitions []struct {
					Node  string `json:"node"`
					Start int64  `json:"start"`
					Size  int64  `json:"size"`
					Type  string `json:"type"`
					Name  string `json:"name"`
				} `json:"partitions"`
			} `json:"partitiontable"`
		}
		if err := json.Unmarshal(sfdisk(t, "", "-J", path), &want); err != nil {
			t.Fatal(err)
		}
		got, err := Read(bytes.NewReader(b), int64(len(b)), Options{})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		i := 0
		for _, w := range want.Table.Partitions {
			if w.Type == "5" {
				continue
			}
			if i == len(got.Partitions) {
				t.Fatalf("%s: %d partitions only", name, i)
			}
			p := got.Partitions[i]
			i++
			kind := p.Type
			if got.Scheme == MBR {
				kind = strings.TrimLeft(kind, "0")
			}
			if p.Offset != w.Start*512 || p.Bytes != w.Size*512 || !strings.EqualFold(kind, w.Type) || p.Name != w.Name || w.Node != fmt.Sprint(path, p.Number) {
				t.Errorf("%s: %+v, sfdisk says %+v", name, p, w)
			}
		}
		if i != len(got.Partitions) {
			t.Errorf("%s: %d partitions, not %d", name, len(got.Partitions), i)
		}
	}
}

func read(b []byte) (*Table, error) {
	return Read(bytes.NewReader(b), int64(len(b)), Options{})
}

// seal makes the checksums of both headers right, and those of their entries.
func seal(b []byte, sector int) {
	for _, h := range [][]byte{b[sector:], b[len(b)-sector:]} {
		le := binary.LittleEndian
		at, n := le.Uint64(h[72:])*uint64(sector), uint64(le.Uint32(h[80:]))*uint64(le.Uint32(h[84:]))
		if at <= uint64(len(b)) && n <= uint64(len(b))-at {
			le.PutUint32(h[88:], crc32.ChecksumIEEE(b[at:at+n]))
		}
		clear(h[16:20])
		le.PutUint32(h[16:], crc32.ChecksumIEEE(h[:92]))
	}
}

// TestDamagedGPT: a damaged first copy is said, and the second read; two damaged ones are refused.
func TestDamagedGPT(t *testing.T) {
	_, whole := makeDisk(t, scripts["gpt"])
	for _, off := range []int{512 + 40, 512, 1024 + 33} {
		b := bytes.Clone(whole)
		b[off] ^= 1
		got, err := read(b)
		if err != nil || len(got.Partitions) != 3 || got.Damage == nil {
			t.Errorf("byte %d: %v", off, err)
		}
		b[len(b)-512+48] ^= 1
		if _, err := read(b); !errors.Is(err, ErrCorrupt) {
			t.Errorf("both copies: %v", err)
		}
	}
}

// TestHostileGPT: tables whose checksums are right and whose partitions cannot be.
func TestHostileGPT(t *testing.T) {
	_, whole := makeDisk(t, scripts["gpt"])
	le := binary.LittleEndian
	for what, spoil := range map[string]func(b []byte){
		"overlap":        func(b []byte) { le.PutUint64(b[1024+128+32:], 4000) },
		"outside":        func(b []byte) { le.PutUint64(b[1024+40:], 1<<40) },
		"backwards":      func(b []byte) { le.PutUint64(b[1024+40:], 2047) },
		"over the table": func(b []byte) { le.PutUint64(b[1024+32:], 2) },
		"entries":        func(b []byte) { le.PutUint32(b[512+80:], 1<<30) },
		"entry size":     func(b []byte) { le.PutUint32(b[512+84:], 100) },
		"entries' place": func(b []byte) { le.PutUint64(b[512+72:], 1<<60) },
		"last":           func(b []byte) { le.PutUint64(b[512+48:], 1<<60) },
	} {
		b := bytes.Clone(whole)
		spoil(b)
		clear(b[len(b)-512:]) // no second copy
		tail := bytes.Clone(b[len(b)-512:])
		seal(b, 512)
		copy(b[len(b)-512:], tail)
		if _, err := read(b); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// makeGPT makes a disk with a GPT of sixteen entries, of which the first are used for ranges of sectors.
func makeGPT(sectors, sector int, parts ...[2]uint64) []byte {
	const count, size = 16, 128
	b := make([]byte, sectors*sector)
	le := binary.LittleEndian
	b[510], b[511], b[446+4] = 0x55, 0xaa, 0xee
	le.PutUint32(b[446+8:], 1)
	le.PutUint32(b[446+12:], uint32(sectors-1))
	last, table := uint64(sectors-1), uint64(count*size/sector+1)
	for _, h := range []struct{ at, other, entries uint64 }{{1, last, 2}, {last, 1, last - table}} {
		p := b[int(h.at)*sector:]
		copy(p, gptSignature)
		le.PutUint32(p[8:], 0x10000)
		le.PutUint32(p[12:], 92)
		le.PutUint64(p[24:], h.at)
		le.PutUint64(p[32:], h.other)
		le.PutUint64(p[40:], 2+table)
		le.PutUint64(p[48:], last-table-1)
		le.PutUint64(p[72:], h.entries)
		le.PutUint32(p[80:], count)
		le.PutUint32(p[84:], size)
		for i, part := range parts {
			e := b[int(h.entries)*sector+i*size:]
			e[0] = 1
			le.PutUint64(e[32:], part[0])
			le.PutUint64(e[40:], part[1])
		}
	}
	seal(b, sector)
	return b
}

// TestLargeSectors reads a GPT of sectors of 4096 bytes.
func TestLargeSectors(t *testing.T) {
	const sector = 4096
	b := makeGPT(2000, sector, [2]uint64{10, 19})
	got, err := read(b)
	if err != nil || got.SectorSize != sector || len(got.Partitions) != 1 || got.Partitions[0].Offset != 10*sector || got.Partitions[0].Bytes != 10*sector {
		t.Fatalf("%+v, %v", got, err)
	}
	clear(b[sector : sector+100])
	if got, err = read(b); err != nil || got.SectorSize != sector || got.Damage == nil {
		t.Errorf("second copy: %+v, %v", got, err)
	}
	if _, err := Read(bytes.NewReader(b), int64(len(b)), Options{SectorSize: 512}); !errors.Is(err, ErrCorrupt) {
		t.Errorf("as of 512 bytes: %v", err)
	}
}

// TestHostileMBR: chains of logical partitions that loop or leave the extended one.
func TestHostileMBR(t *testing.T) {
	_, whole := makeDisk(t, scripts["extended"])
	le := binary.LittleEndian
	second := 8192 * 512 // the first table of a logical partition
	for what, spoil := range map[string]func(b []byte){
		"loop":     func(b []byte) { le.PutUint32(b[second+446+16+8:], 0) },
		"leaves":   func(b []byte) { le.PutUint32(b[second+446+16+8:], 60000) },
		"outside":  func(b []byte) { le.PutUint32(b[second+446+12:], 1<<31) },
		"none":     func(b []byte) { b[second+510] = 0 },
		"overlaps": func(b []byte) { le.PutUint32(b[446+12:], 7000) },
		"beyond":   func(b []byte) { le.PutUint32(b[446+16+12:], 1<<30) },
		"two":      func(b []byte) { b[446+4] = 0x0f },
	} {
		b := bytes.Clone(whole)
		spoil(b)
		if _, err := read(b); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestContents: what is not read is recognised and refused with a word of what to do.
func TestContents(t *testing.T) {
	seen := map[Content]bool{}
	for _, m := range magics {
		b := make([]byte, 1<<20)
		copy(b[m.offset:], m.bytes)
		got, err := read(b)
		if err != nil || got.Scheme != Bare || got.Partitions[0].Content != m.content {
			t.Errorf("%s at %d: %+v, %v", m.content, m.offset, got, err)
		}
		if err := m.content.Refusal(); (err == nil) != (m.content == Ext || m.content == FAT) || err != nil && !errors.Is(err, ErrRefused) {
			t.Errorf("%s: %v", m.content, err)
		}
		seen[m.content] = true
	}
	old := make([]byte, 1<<20)
	copy(old[len(old)-64<<10:], "\xfc\x4e\x2b\xa9")
	if c, err := Identify(bytes.NewReader(old), int64(len(old))); c != RAID || err != nil {
		t.Errorf("old RAID: %v, %v", c, err)
	}
	if _, err := read(make([]byte, 1<<20)); !errors.Is(err, ErrNone) {
		t.Errorf("nothing: %v", err)
	}
	if _, err := read(nil); !errors.Is(err, ErrNone) {
		t.Errorf("no bytes: %v", err)
	}
	_, b := makeDisk(t, scripts["mbr"])
	copy(b[1024+0x38:], "\x53\xef")
	if _, err := read(b); !errors.Is(err, ErrAmbiguous) {
		t.Errorf("both: %v", err)
	}
}

// TestReadErrors: what cannot be read is said, and nothing is made of it.
func TestReadErrors(t *testing.T) {
	_, b := makeDisk(t, scripts["extended"])
	if _, err := Read(bytes.NewReader(b[:9000*512]), int64(len(b)), Options{}); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("%v", err)
	}
}

// FuzzRead: partitions lie on the disk and do not overlap, whatever it holds.
func FuzzRead(f *testing.F) {
	f.Add(makeGPT(40, 512, [2]uint64{10, 19}, [2]uint64{21, 24}), true)
	f.Add(makeGPT(16, 4096, [2]uint64{6, 7}), false)
	mbr := make([]byte, 20<<10)
	for _, e := range []struct {
		sector, index int
		kind          byte
		first, count  uint32
	}{{0, 0, 0x83, 1, 4}, {0, 1, 5, 8, 30}, {8, 0, 0x83, 1, 5}, {8, 1, 5, 10, 10}, {18, 0, 0x82, 2, 4}} {
		b := mbr[e.sector*512:]
		b[510], b[511] = 0x55, 0xaa
		b[mbrEntries+16*e.index+4] = e.kind
		binary.LittleEndian.PutUint32(b[mbrEntries+16*e.index+8:], e.first)
		binary.LittleEndian.PutUint32(b[mbrEntries+16*e.index+12:], e.count)
	}
	if t, err := read(mbr); err != nil || len(t.Partitions) != 3 {
		f.Fatalf("%+v, %v", t, err)
	}
	f.Add(mbr, false)
	f.Fuzz(func(t *testing.T, b []byte, sealed bool) {
		if b = bytes.Clone(b); sealed && len(b) > 2048 {
			seal(b, 512)
		}
		got, err := read(b)
		if err != nil {
			return
		}
		for _, p := range got.Partitions {
			if p.Bytes <= 0 || p.Offset < 0 || p.Offset+p.Bytes > int64(len(b)) {
				t.Fatalf("%+v on a disk of %d", p, len(b))
			}
			_ = p.Content.Refusal()
		}
		if err := got.checkOverlaps(); err != nil {
			t.Fatal(err)
		}
	})
}
