package ext4

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// benchImage is a file system about as a small root is: most files are of some kilobytes, some of megabytes.
func benchImage(b *testing.B) (image string, files int) {
	b.Helper()
	dir := b.TempDir()
	data := random(1, 4<<20)
	for i := range 12000 {
		n := 200 + (i*i*7919)%24000
		switch {
		case i%97 == 0:
			n = 300_000 + i*20
		case i%1009 == 0:
			n = 3 << 20
		}
		write(b, filepath.Join(dir, fmt.Sprintf("usr/share/d%03d/file-%d", i%211, i)), data[i%1000:][:n])
	}
	image = filepath.Join(b.TempDir(), "root.img")
	must(b, "mke2fs", "-q", "-F", "-t", "ext4", "-d", dir, image, "600M")
	return image, 12000
}

// BenchmarkExt4Scan reads the contents of all files, and has debugfs rdump do so in the same run, with a warm cache:
// ratio is that of files per second.
func BenchmarkExt4Scan(b *testing.B) {
	image, files := benchImage(b)
	if _, err := scanAll(image, files); err != nil { // warms the cache
		b.Fatal(err)
	}
	var ours, peers []time.Duration
	var read int64
	for b.Loop() {
		start := time.Now()
		n, err := scanAll(image, files)
		if err != nil {
			b.Fatal(err)
		}
		ours, read = append(ours, time.Since(start)), n
		b.StopTimer()
		dir, err := os.MkdirTemp(dumpDir(b), "dump")
		if err != nil {
			b.Fatal(err)
		}
		start = time.Now()
		must(b, "debugfs", "-R", "rdump /usr "+dir, image)
		peers = append(peers, time.Since(start))
		if err := os.RemoveAll(dir); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
	our, peer := median(ours), median(peers)
	b.ReportMetric(float64(peer)/float64(our), "ratio")
	b.ReportMetric(float64(files)/our.Seconds(), "files/s")
	b.ReportMetric(float64(files)/peer.Seconds(), "debugfs-files/s")
	b.ReportMetric(float64(read)/our.Seconds()/1e9, "GB/s")
}

// dumpDir is where debugfs puts the files: memory if there is some, so that no disk's time is counted.
func dumpDir(b *testing.B) string {
	if exists("/dev/shm") {
		return "/dev/shm"
	}
	return b.TempDir()
}

func median(all []time.Duration) time.Duration {
	slices.Sort(all)
	return all[len(all)/2]
}

func scanAll(image string, files int) (int64, error) {
	file, err := os.Open(image)
	if err != nil {
		return 0, err
	}
	defer file.Close()
	st, err := file.Stat()
	if err != nil {
		return 0, err
	}
	f, err := Open(file, st.Size(), Options{})
	if err != nil {
		return 0, err
	}
	total, count := int64(0), 0
	for e, err := range f.Walk() {
		if err != nil {
			return 0, err
		}
		if e.Inode.Type() != unix.S_IFREG {
			continue
		}
		r, err := e.Inode.Open()
		if err != nil {
			return 0, err
		}
		n, err := r.WriteTo(io.Discard)
		if err != nil {
			return 0, err
		}
		total += n
		count++
	}
	if count != files {
		return 0, fmt.Errorf("%d files, not %d", count, files)
	}
	return total, nil
}
