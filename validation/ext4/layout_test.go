package ext4

import "testing"

// TestLayout: inodes are where the layout says, and its fingerprint tells a file system of the same places from others.
func TestLayout(t *testing.T) {
	tr := standard(t, 1024, 120, 300, false)
	for _, s := range []shape{{kind: "ext4", block: 1024, inode: 256}, {kind: "ext2", block: 1024, inode: 128}, {kind: "ext4", block: 1024, inode: 256, features: "meta_bg,^resize_inode,^flex_bg"}} {
		image := tr.image(t, "80M", s.args()...)
		f := open(t, image)
		l, err := f.Layout()
		if err != nil {
			t.Fatal(err)
		}
		r := f.InodeReader()
		for in, err := range f.Inodes() {
			if err != nil {
				t.Fatal(err)
			}
			again, err := r.Inode(in.Number)
			if err != nil || again.Offset() != in.Offset() || l.Inode(in.Number) != (Range{in.Offset(), f.sb.inodeSize}) {
				t.Errorf("%v: inode %d is at %d, and %v", s, in.Number, in.Offset(), l.Inode(in.Number))
			}
		}
		if got := l.Inode(0); got != (Range{}) {
			t.Errorf("inode 0 is at %v", got)
		}
		if got := l.Inode(^uint32(0)); got != (Range{}) {
			t.Errorf("the last inode that can be is at %v", got)
		}
		debugfs(t, image, "mkdir /more", "rm /big")
		must(t, "tune2fs", "-L", "other", image)
		if m, err := open(t, image).Layout(); err != nil || m.Fingerprint != l.Fingerprint {
			t.Errorf("%v: another fingerprint after a change of files: %v", s, err)
		}
		must(t, "resize2fs", image, "100M")
		if m, err := open(t, image).Layout(); err != nil || m.Fingerprint == l.Fingerprint {
			t.Errorf("%v: the same fingerprint after a resize: %v", s, err)
		}
	}
}
