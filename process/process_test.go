package process

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

// TestMain is the child's, too: go test never starts a test binary without arguments.
func TestMain(m *testing.M) {
	if len(os.Args) == 1 {
		_, err := os.Stderr.Write(bytes.Repeat([]byte("said again\n"), 1<<15))
		if err != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// TestFullLog: a child whose log cannot be written says what it has to say, and ends.
func TestFullLog(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink("/dev/full", filepath.Join(dir, "child.log")); err != nil {
		t.Fatal(err)
	}
	p, err := Start(Options{Program: filepath.Base(os.Args[0]), Label: "child", LogDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Control.Close()
	<-p.Done()
	if err := p.Err(); err != nil {
		t.Error(err)
	}
}
