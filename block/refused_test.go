package block

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestOverlayRefused: what is not the overlay of its base, whole, is refused in one line.
func TestOverlayRefused(t *testing.T) {
	change := func(do func(overlay, base string) error) func(overlay, base string) (string, string, error) {
		return func(overlay, base string) (string, string, error) { return overlay, base, do(overlay, base) }
	}
	for name, c := range map[string]struct {
		do   func(overlay, base string) (string, string, error)
		want error
	}{
		"base written": {change(func(_, base string) error {
			f, err := os.OpenFile(base, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			_, err = f.WriteAt([]byte{1}, 0)
			return errors.Join(err, f.Close())
		}), ErrBase},
		"base grown": {change(func(_, base string) error { return os.Truncate(base, oddSize+512) }), ErrBase},
		"another base": {func(overlay, base string) (string, string, error) {
			other, _ := newBase(t, oddSize, 2)
			return overlay, other, nil
		}, ErrBase},
		"base twice":  {func(_, base string) (string, string, error) { return base, base, nil }, ErrInUse},
		"no overlay":  {func(_, base string) (string, string, error) { return create(t), base, nil }, ErrNoOverlay},
		"overlay cut": {change(func(overlay, _ string) error { return os.Truncate(overlay, oddSize/OverlayBlock*OverlayBlock) }), ErrNoOverlay},
		"overlay grown": {change(func(overlay, _ string) error {
			return os.Truncate(overlay, roundUp(oddSize)+4*OverlayBlock)
		}), ErrNoOverlay},
		"holes filled": {change(func(overlay, _ string) error {
			b, err := os.ReadFile(overlay)
			if err != nil {
				return err
			}
			return os.WriteFile(overlay, b, 0o600)
		}), errHoles},
		"trailer damaged": {change(func(overlay, _ string) error {
			f, err := os.OpenFile(overlay, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			_, err = f.WriteAt([]byte{1}, roundUp(oddSize)+OverlayBlock+20)
			return errors.Join(err, f.Close())
		}), nil},
	} {
		base, _ := newBase(t, oddSize, 1)
		overlay, base, err := c.do(newOverlay(t, base), base)
		if err != nil {
			t.Fatal(err)
		}
		o, err := tryOverlay(overlay, base, false)
		switch {
		case err == nil:
			t.Errorf("%s: was opened", name)
			_ = o.Close()
		case c.want != nil && !errors.Is(err, c.want):
			t.Errorf("%s: %v", name, err)
		case bytes.ContainsRune([]byte(err.Error()), '\n'):
			t.Errorf("%s: more than a line: %v", name, err)
		}
	}
}

func TestCreateOverlayRefused(t *testing.T) {
	base, _ := newBase(t, oddSize, 1)
	path := newOverlay(t, base)
	if _, err := CreateOverlay(path, base); !errors.Is(err, os.ErrExist) {
		t.Errorf("over a file: %v", err)
	}
	if _, err := CreateOverlay(path+"2", path); err == nil {
		t.Error("an overlay of an overlay")
	}
	huge := filepath.Join(t.TempDir(), "huge")
	if err := Create(huge, MaxOverlay+SectorSize); err != nil {
		t.Fatal(err)
	}
	if _, err := CreateOverlay(path+"2", huge); err == nil {
		t.Error("a huge one")
	}
	w := open(t, create(t), false)
	if _, err := CreateOverlay(path+"2", w.f.Name()); !errors.Is(err, ErrInUse) {
		t.Errorf("with a writer: %v", err)
	}
	if _, err := os.Stat(path + "2"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a refused overlay is left: %v", err)
	}
}

// TestOverlayNoHoles: file systems that tell of no holes, or of larger ones, are refused.
func TestOverlayNoHoles(t *testing.T) {
	base, _ := newBase(t, oddSize, 1)
	for _, c := range []struct{ kind, options string }{{"ramfs", ""}, {"tmpfs", "huge=always,size=64m"}} {
		t.Run(c.kind, func(t *testing.T) {
			dir := t.TempDir()
			if err := unix.Mount("none", dir, c.kind, 0, c.options); err != nil {
				t.Skipf("needs root and a kernel with %s (%s), as `make test` has: %v", c.kind, c.options, err)
			}
			defer func() {
				if err := unix.Unmount(dir, 0); err != nil {
					t.Error(err)
				}
			}()
			path := filepath.Join(dir, "overlay")
			if _, err := CreateOverlay(path, base); !errors.Is(err, errHoles) {
				t.Errorf("made: %v", err)
			}
			// What a copy to such a file system makes.
			b, err := os.ReadFile(newOverlay(t, base))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := tryOverlay(path, base, false); !errors.Is(err, errHoles) {
				t.Errorf("opened: %v", err)
			}
		})
	}
}
