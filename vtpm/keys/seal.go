package keys

import (
	"errors"
	"fmt"
	"os"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxtpm"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"
)

// A Host is the host's TPM; nil is none.
type Host struct {
	name string
	open func() (transport.TPMCloser, error)
}

// String names it.
func (h *Host) String() string { return h.name }

// HostAt is the TPM with the path of its device or of an emulator's socket; "": none.
func HostAt(path string) *Host {
	if path == "" {
		return nil
	}
	return &Host{path, func() (transport.TPMCloser, error) { return openTPM(path) }}
}

// HostOver is the TPM at the other end of f, an open device or a connected socket, which belongs
// to the Host and serves for one Create or Open.
func HostOver(name string, f *os.File) *Host {
	return &Host{name, func() (transport.TPMCloser, error) { return transport.FromReadWriteCloser(f), nil }}
}

func openTPM(path string) (transport.TPMCloser, error) {
	st, err := os.Stat(path)
	switch {
	case err != nil:
		return nil, err
	case st.Mode()&os.ModeSocket != 0:
		return linuxudstpm.Open(path)
	case st.Mode()&os.ModeCharDevice != 0:
		return linuxtpm.Open(path)
	}
	return nil, errors.New("neither a device nor a socket")
}

// withSRK runs f with the storage root key: the standard P-256 primary of the owner hierarchy
// (TCG TPM v2.0 Provisioning Guidance §7.5.1), made anew because its template always gives the same key.
// f's session encrypts what crosses the wire in the direction it says; a TPM on a bus can be
// listened to.
func withSRK(tpm transport.TPM, f func(srk *tpm2.CreatePrimaryResponse, public tpm2.TPMTPublic) error) (err error) {
	srk, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		InPublic:      tpm2.New2B(tpm2.ECCSRKTemplate),
	}.Execute(tpm)
	if err != nil {
		return fmt.Errorf("storage root key: %w", err)
	}
	defer func() {
		if _, ferr := (tpm2.FlushContext{FlushHandle: srk.ObjectHandle}).Execute(tpm); err == nil {
			err = ferr
		}
	}()
	public, err := srk.OutPublic.Contents()
	if err != nil {
		return fmt.Errorf("storage root key: %w", err)
	}
	return f(srk, *public)
}

// seal makes a sealed object of key under the storage root key.
func seal(host *Host, key []byte) (public, private []byte, err error) {
	tpm, err := host.open()
	if err != nil {
		return nil, nil, err
	}
	defer tpm.Close()
	err = withSRK(tpm, func(srk *tpm2.CreatePrimaryResponse, srkPublic tpm2.TPMTPublic) error {
		rsp, err := tpm2.Create{
			ParentHandle: tpm2.AuthHandle{
				Handle: srk.ObjectHandle, Name: srk.Name,
				Auth: tpm2.HMAC(tpm2.TPMAlgSHA256, 16, tpm2.AESEncryption(128, tpm2.EncryptIn), tpm2.Salted(srk.ObjectHandle, srkPublic)),
			},
			InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
				Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: key}),
			}},
			InPublic: tpm2.New2B(tpm2.TPMTPublic{
				Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256,
				ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, UserWithAuth: true, NoDA: true},
			}),
		}.Execute(tpm)
		if err != nil {
			return err
		}
		public, private = rsp.OutPublic.Bytes(), rsp.OutPrivate.Buffer
		return nil
	})
	return public, private, err
}

// unseal opens what seal made.
func unseal(host *Host, public, private []byte) (key []byte, err error) {
	tpm, err := host.open()
	if err != nil {
		return nil, err
	}
	defer tpm.Close()
	err = withSRK(tpm, func(srk *tpm2.CreatePrimaryResponse, srkPublic tpm2.TPMTPublic) (err error) {
		obj, err := tpm2.Load{
			ParentHandle: tpm2.AuthHandle{Handle: srk.ObjectHandle, Name: srk.Name, Auth: tpm2.PasswordAuth(nil)},
			InPublic:     tpm2.BytesAs2B[tpm2.TPMTPublic](public),
			InPrivate:    tpm2.TPM2BPrivate{Buffer: private},
		}.Execute(tpm)
		if err != nil {
			return fmt.Errorf("it was sealed by another TPM, or this one was cleared: %w", err)
		}
		defer func() {
			if _, ferr := (tpm2.FlushContext{FlushHandle: obj.ObjectHandle}).Execute(tpm); err == nil {
				err = ferr
			}
		}()
		rsp, err := tpm2.Unseal{ItemHandle: tpm2.AuthHandle{
			Handle: obj.ObjectHandle, Name: obj.Name,
			Auth: tpm2.HMAC(tpm2.TPMAlgSHA256, 16, tpm2.AESEncryption(128, tpm2.EncryptOut), tpm2.Salted(srk.ObjectHandle, srkPublic)),
		}}.Execute(tpm)
		if err != nil {
			return err
		}
		key = rsp.OutData.Buffer
		return nil
	})
	return key, err
}
