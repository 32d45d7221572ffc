package debian

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/pierrec/lz4/v4"
)

// maxVmlinux bounds an unpacked kernel, in bytes.
const maxVmlinux = 128 << 20

// Vmlinux is the unpacked image of a kernel that is packed by lz4, as the cloud kernel of 6.1 is.
func (r *Root) Vmlinux(kernel string) ([]byte, error) {
	path, err := r.Vmlinuz(kernel)
	if err != nil {
		return nil, err
	}
	packed, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	start := bytes.Index(packed, []byte("\x02\x21\x4c\x18")) // of a legacy frame
	if start < 0 {
		return nil, fmt.Errorf("%s is not packed by lz4", path)
	}
	// The image's length follows it where a block's would be, so the end is an error or none.
	var image bytes.Buffer
	_, err = io.Copy(&image, io.LimitReader(lz4.NewReader(bytes.NewReader(packed[start:])), maxVmlinux))
	if image.Len() < len(packed) {
		return nil, errors.Join(fmt.Errorf("%s: unpacked to %d bytes", path, image.Len()), err)
	}
	return image.Bytes(), nil
}
