// Package ext4 reads ext2, ext3 and ext4 file systems from an [io.ReaderAt]: without mounting, without privileges, and
// without ever writing.
//
// It is made for images that somebody hostile may have made. Each place is checked before it is read and each checksum
// that the file system has is verified; what a call does is bounded by the image's size, what it keeps by
// [Options.MaxMemory]. Errors name what is wrong and the byte of the image it is at, and tell apart what is damaged
// ([ErrCorrupt], [ErrChecksum]), what is merely not known here ([ErrUnsupported]) and what the reader below could not read.
// Where the format leaves a choice the kernel's is taken, because what the guest sees is what counts.
//
// A file system that was not unmounted is read as it will be once its journal was replayed: the blocks that committed
// transactions hold are taken from the journal instead of their places (JBD2: all checksum versions, revoked, escaped
// and 64-bit blocks). Refused are transactions that fail their checksums, fast commits that were not replayed, and
// external journals.
//
// Not read: encrypted, compressed and case-folding file systems, backup superblocks. Contents that verity protects are
// read, not verified. All methods of [FS] and [Inode] may be called by several goroutines.
//
// Source: Linux, Documentation/filesystems/ext4 (named below by its files' section titles); for what it does not say,
// fs/ext4 and fs/jbd2.
package ext4
