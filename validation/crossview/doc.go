// Package crossview finds what a running guest hides: names that its disk has, and that a listing which was made inside the
// guest does not show. A rootkit that filters what the kernel says of directories is found so, and so is what lies below a
// mount point.
//
// Both views may be an attacker's. What a listing leaves out is a deviation, so a guest can gain nothing by a listing that
// lies less; one that cannot be read, or that is cut off, is an error. The disk is read by package ext4, and what a comparison
// keeps is bounded by the listing's size and by [Options].
//
// What was made, renamed or changed after the listing was begun cannot be told from what is hidden, as far as the disk says: it
// is counted, not called hidden. The times are the guest's, which may set them; so whoever hides something and keeps changing it
// is found by the count alone.
package crossview
