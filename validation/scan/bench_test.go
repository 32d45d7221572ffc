package scan

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/validation/baseline"
	"redoubt.dev/redoubt/validation/ext4"
)

// everything wants everything.
type everything struct{}

func (everything) Want(baseline.Name, uint32) baseline.Want {
	return baseline.Descend | baseline.Metadata | baseline.Content | baseline.Xattrs
}

// benchTree is a tree about as a Debian root is: most files are of some kilobytes, some of megabytes.
func benchTree(b *testing.B, files int) string {
	b.Helper()
	dir := b.TempDir()
	data := random(rand.New(rand.NewPCG(1, 1)), 8<<20)
	r := rand.New(rand.NewPCG(2, 2))
	for d := range files/25 + 1 {
		at := filepath.Join(dir, "usr", fmt.Sprintf("part%02d", d%37), fmt.Sprintf("directory-%d", d))
		if err := os.MkdirAll(at, 0o755); err != nil {
			b.Fatal(err)
		}
		for i := range min(25, files-25*d) {
			n := 1<<10 + r.IntN(23<<10)
			switch k := r.IntN(1000); {
			case k < 2:
				n = 1<<20 + r.IntN(3<<20)
			case k < 20:
				n = 60<<10 + r.IntN(300<<10)
			}
			if err := os.WriteFile(filepath.Join(at, fmt.Sprintf("a-file-%d.so", i)), data[r.IntN(4<<20):][:n], 0o644); err != nil {
				b.Fatal(err)
			}
		}
	}
	return dir
}

func benchImage(b *testing.B, dir, size, features string) (*os.File, Source) {
	b.Helper()
	image := filepath.Join(b.TempDir(), "root.img")
	must(b, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-O", features, "-d", dir, image, size)
	file, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { file.Close() })
	st, err := file.Stat()
	if err != nil {
		b.Fatal(err)
	}
	return file, Source{Reader: file, Size: st.Size()}
}

func benchScan(b *testing.B, s Source, last *Index, files int) (*Result, time.Duration) {
	b.Helper()
	start := time.Now()
	r, err := Run(context.Background(), []Source{s}, [32]byte{}, everything{}, last, Options{})
	took := time.Since(start)
	if err != nil || len(r.Problems) > 0 || r.Stats.Names < files || r.Full != (last == nil) {
		b.Fatalf("%v, %+v, %.300v, %s", err, r.Stats, r.Problems, r.Why)
	}
	return r, took
}

func median(all []time.Duration) time.Duration {
	slices.Sort(all)
	return all[len(all)/2]
}

// BenchmarkValidateFull scans an image of a tree, and has AIDE make its database of the tree itself in the same run, both with a
// warm cache: ratio is that of their times.
func BenchmarkValidateFull(b *testing.B) {
	const files = 30_000
	dir := benchTree(b, files)
	_, s := benchImage(b, dir, "1500M", "metadata_csum")
	config := filepath.Join(b.TempDir(), "aide.conf")
	put(b, config, []byte(fmt.Sprintf("database_out=file:%s\ngzip_dbout=no\nreport_url=stdout\n%s p+u+g+n+s+ftype+acl+xattrs+caps+sha256\n",
		filepath.Join(b.TempDir(), "aide.db"), dir)))
	peer := func() time.Duration {
		start := time.Now()
		if out, err := tool(b, "aide", "--init", "--config="+config).CombinedOutput(); err != nil || !strings.Contains(string(out), "Number of entries") {
			b.Fatalf("aide: %v: %.2000s", err, out)
		}
		return time.Since(start)
	}
	benchScan(b, s, nil, files) // warms the caches
	peer()
	var ours, peers []time.Duration
	var stats Stats
	for b.Loop() {
		r, took := benchScan(b, s, nil, files)
		ours, stats = append(ours, took), r.Stats
		b.StopTimer()
		peers = append(peers, peer())
		b.StartTimer()
	}
	our := median(ours)
	b.ReportMetric(float64(our)/float64(median(peers)), "ratio")
	b.ReportMetric(float64(stats.Names)/our.Seconds(), "files/s")
	b.ReportMetric(float64(stats.Bytes)/our.Seconds()/1e9, "GB/s")
	b.ReportMetric(median(peers).Seconds()*1e3, "aide-ms")
}

// BenchmarkValidateIncremental scans what changed of 100,000 files, from the last index's encoded form to the next's: ratio is that
// of its time to a full scan's in the same run.
func BenchmarkValidateIncremental(b *testing.B) {
	const files = 100_000
	r := rand.New(rand.NewPCG(3, 3))
	file, s := benchImage(b, benchTree(b, files), "4G", "^metadata_csum")
	state, _ := benchScan(b, s, nil, files)
	var full []time.Duration
	for _, c := range []struct {
		name  string
		count int
	}{{"0.1pct", files / 1000}, {"1pct", files / 100}, {"10pct", files / 10}} {
		b.Run(c.name, func(b *testing.B) {
			var times []time.Duration
			var stats Stats
			for b.Loop() {
				b.StopTimer()
				s.Changed = modify(b, file, s.Size, c.count, r)
				encoded := state.Index.Bytes()
				if len(full) < 5 {
					_, took := benchScan(b, Source{Reader: s.Reader, Size: s.Size}, nil, files)
					full = append(full, took)
				}
				b.StartTimer()
				start := time.Now()
				last, err := Open(encoded)
				if err != nil {
					b.Fatal(err)
				}
				opened := time.Since(start)
				next, _ := benchScan(b, s, last, files)
				times = append(times, time.Since(start))
				state, stats = next, next.Stats
				b.ReportMetric(opened.Seconds()*1e3, "open-ms")
				if len(next.Touched) != c.count {
					b.Fatalf("%d names touched, %+v", len(next.Touched), stats)
				}
			}
			b.ReportMetric(float64(median(times))/float64(median(full)), "ratio")
			b.ReportMetric(median(times).Seconds()*1e3, "scan-ms")
			b.ReportMetric(median(full).Seconds()*1e3, "full-ms")
			b.ReportMetric(float64(stats.Inodes), "inodes")
			b.ReportMetric(float64(len(state.Index.Bytes()))/files, "index-B/file")
		})
	}
}

// modify changes the contents of files where they lie, and their inodes' times, as a guest's writing would; the image has no checksums
// of inodes then to be made right.
func modify(b *testing.B, file *os.File, size int64, count int, r *rand.Rand) *Changes {
	b.Helper()
	const granule = 4096
	c := &Changes{Granule: granule, Bits: make([]uint64, size/granule/64+1)}
	f, err := ext4.Open(file, size, ext4.Options{})
	if err != nil {
		b.Fatal(err)
	}
	var inodes []*ext4.Inode
	for in, err := range f.Inodes() {
		if err != nil {
			b.Fatal(err)
		}
		if in.Number >= 11 && in.Type() == unix.S_IFREG && in.Size > 0 {
			inodes = append(inodes, in)
		}
	}
	for _, k := range r.Perm(len(inodes))[:count] {
		in := inodes[k]
		mark := func(off int64, p []byte) {
			if _, err := file.WriteAt(p, off); err != nil {
				b.Fatal(err)
			}
			c.Bits[off/granule/64] |= 1 << (off / granule % 64)
		}
		mark(in.Offset()+0x10, random(r, 4)) // mtime
		for e, err := range in.Extents() {
			if err != nil {
				b.Fatal(err)
			}
			if e.Kind == ext4.Data {
				mark(e.Offset, random(r, 16))
				break
			}
		}
	}
	return c
}
